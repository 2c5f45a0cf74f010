"""Operations with kernels of their own, all on local arrays.

Each folder has api, reference and one module per backend. `softmax` has their common numerics,
`tuning` the settings that were measured, `target` what is compiled for.
"""
