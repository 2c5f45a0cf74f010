"""Operations with kernels of their own; each folder has api, reference and one file per backend."""
