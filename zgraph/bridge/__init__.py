"""All that zgraph knows of torch's inside, and of the machine that it runs on."""
