"""What the actions and the proprioception of a robot are made of: one file per body.

A file exports ACTION and PROPRIO, for `dataset.action` and `dataset.proprio` in a config, and says
in its docstring which streams they read (`vectors.parts` explains the parts), how wide they are,
how fast the robot is controlled, and where the convention is from. Another body is another such
file and a line in `tests/test_embodiments.py`.
"""
