"""Run files: the format, and questions to one."""
