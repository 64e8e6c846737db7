"""An emulator of PTX, so that the tests run what the compilers made of the kernels.

``parser`` reads PTX text, ``instructions`` gives each opcode its meaning, ``memory`` holds bytes
and watches who touches them, ``machine`` runs a grid. Of Hopper's units ``wgmma`` multiplies,
``tma`` copies boxes, ``barriers`` wait in memory, and ``order`` keeps what each thread has seen.
Everything unknown is an error: an opcode, a modifier, an address outside the tensors of the launch.

Meanings are those of NVIDIA's PTX ISA manual (9.1); where it leaves something open (the error of an
approximation, when an asynchronous copy lands, uninitialised shared memory) the worst it allows.
"""
