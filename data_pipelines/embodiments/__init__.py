"""What the actions and the proprioception of a robot consist of: one file per robot.

A file exports `ACTION` and `PROPRIO`, tuples of parts (see `data_pipelines.vectors`), and further
pairs with a prefix (`RAW_ACTION`) for datasets that store the same robot in another way. Where
simulators or clients of the robot exist, `CAMERAS` names its cameras, the main one first: each with
the last words of the streams that datasets call it by ("observation.images.top" is "top"). Its
docstring gives the streams, the widths of the vectors, the control rate, and the source of the
convention. A robot of one's own needs no file here: its configuration describes it, as
`configs/my_robot.py` does (docs/robot.md). To add one to the package:

1. Find its streams: `python -m launch.inspect DATASET` lists their names, widths and rates.
2. Write `<robot>.py` here, for example

       ACTION = (
           dict(stream="action", columns=(0, 1, 2)),
           dict(stream="action", columns=(3, 4, 5), represent="rotation", rotation="rotvec"),
           dict(stream="action", columns=(6,), represent="gripper", closed=0.0, open=0.08),
       )
       PROPRIO = (dict(stream="observation.state", columns=(0, 1, 2, 3, 4, 5, 6)),)

3. Add a line to `EMBODIMENTS` in `tests/test_embodiments.py`, which checks the widths of the
   vectors and that predicted actions convert back to the robot's own.
4. Set `config.datasets.NAME.action = <robot>.ACTION` and `proprio` likewise in a configuration, and
   `dataset.embodiment` to the robot's name; statistics and action masks are per embodiment.
"""
