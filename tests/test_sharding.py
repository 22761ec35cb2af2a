"""FSDP2 on two gloo processes: the same steps as one process, one kind of checkpoint."""

from files import write_demos
from tiny_run import compare, flags, run_command

SMALL = dict(preset="tiny-openvla", micro_batch=2, val_frames=4, cooldown=0, warmup=0)


def test_two_sharded_processes_take_the_steps_of_one_and_either_resumes_the_other(tmp_path):
    data, one, two = tmp_path / "data", tmp_path / "one", tmp_path / "two"
    write_demos(data / "set_table/close/fridge", lengths=(30, 30))
    for processes, out in ((1, one), (2, two)):
        run_command(processes, *flags(data, out, **SMALL))
    compare(one, two, every=True, rel=1e-4, atol=1e-5)
    for processes, out in ((2, one), (1, two)):
        assert "resumed" in run_command(processes, *flags(data, out, steps=3, **SMALL))
    compare(one, two, every=True, rel=1e-4, atol=1e-5)


def test_a_sharded_model_with_every_decoder_takes_the_steps_of_one_process(tmp_path):
    """As after `--preset tiny --shard`: BatchNorm, the latents and stage 1 and 2 included."""
    write_demos(tmp_path / "data/set_table/close/fridge", lengths=(30, 30))
    settings = SMALL | dict(preset="tiny", stage=2, micro_batch=8, steps=1)
    for processes in (1, 2):
        out = tmp_path / str(processes)
        run_command(processes, *flags(tmp_path / "data", out, **settings), "--shard")
    compare(tmp_path / "1", tmp_path / "2", rel=1e-4)
