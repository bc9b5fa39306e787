"""A measured profile of this machine is one like any other."""

import zgraph
from zgraph.cost import hardware


def test_this_machine_can_be_measured_and_planned_for(tmp_path):
    path = tmp_path / "this-machine.toml"
    found = zgraph.profile_machine(path)
    assert hardware(str(path)) == found
    assert found.name == "this-machine"
    assert found.device.rate("f32") > 1e8
    assert found.device.memory_bytes_per_s > 1e7
