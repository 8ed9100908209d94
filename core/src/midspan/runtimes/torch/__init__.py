"""The torch runtime: graphs to straight-line code over torch tensors.

For devices that torch can compute on. It is handed a torch device string and a
table of kernels and knows no hardware; every operation has a portable version
here, so that a device needs to write only the kernels that it wants faster.
Needs the extra ``midspan[torch]``; nothing else in the core imports it.
"""
