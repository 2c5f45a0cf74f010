import base64

import pytest

MERGES = [b"th", b"the", b" t", b" the", b"ing", "é".encode(), "界".encode()[:2], b"  "]
MERGES += [b"\n\n", b"\n ", b" \n"]


@pytest.fixture(scope="session")
def ranks_file(tmp_path_factory):
    """A small byte-pair vocabulary: byte b has rank 255 - b, the merges follow."""
    tokens = [bytes([byte]) for byte in range(255, -1, -1)] + MERGES
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    path = tmp_path_factory.mktemp("ranks") / "tiny.tiktoken"
    path.write_text("\n".join(lines) + "\n")
    return path
