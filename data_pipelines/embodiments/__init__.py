"""What the actions and the proprioception of a robot are made of: one file per robot.

A file exports `ACTION` and `PROPRIO`, tuples of parts (`data_pipelines.vectors` explains them), and
further pairs with a prefix (`RAW_ACTION`) for data that store the same robot otherwise. Its
docstring says which streams they read, how wide the vectors are, how fast the robot is controlled,
and where the convention is from. To add a robot:

1. Find its streams: `python -m launch.inspect DATASET` lists their names, widths and rates.
2. Write `<robot>.py` here, for example

       ACTION = (
           dict(stream="action", columns=(0, 1, 2)),
           dict(stream="action", columns=(3, 4, 5), represent="rotation", rotation="rotvec"),
           dict(stream="action", columns=(6,), represent="gripper", closed=0.0, open=0.08),
       )
       PROPRIO = (dict(stream="observation.state", columns=(0, 1, 2, 3, 4, 5, 6)),)

3. Add a line to `EMBODIMENTS` in `tests/test_embodiments.py`, which checks that an episode becomes
   vectors of the width you expect and that predicted actions become the robot's own again.
4. Use it in a configuration: `config.dataset.action = <robot>.ACTION`, and so for `proprio`; set
   `dataset.embodiment` to its name, by which statistics and action masks are kept apart.
"""
