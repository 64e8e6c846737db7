"""The Triton backend: every op on NVIDIA GPUs, without a build step.

``noise`` device functions of the contract; ``displace``, ``update``, ``linear``, ``loss`` the
kernels; ``devices`` and ``plan`` what is done how; ``launch`` launches and deferred errors;
``backend`` the adapters onto the ops. Importing this package imports no Triton.
"""
