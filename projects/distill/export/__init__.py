"""Students as ONNX and TorchScript files, and what runs them.

- :mod:`.graphs`: inference as a function of tensors, for each kind of network.
- :mod:`.writer`: writes a graph and its metadata to a file.
- :mod:`.parity`: compares a file with its network.
- :mod:`.student`: the student in the folder of a training.
- :mod:`.main`: the command ``distill export``.
- :mod:`.runner`: runs a file without torch.
- :mod:`.predict`: the command ``distill predict``.

Nothing is imported here, because :mod:`.runner` needs neither torch nor detectron2.
"""
