"""The device side: check the board, build plugin and TensorRT engine, run the recorded vectors. Needs numpy, click."""
