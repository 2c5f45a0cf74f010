"""Every mechanism, and the decoder around it, written out in NumPy."""

import numpy as np
import pytest
import tiny
from decoding import whole_pass
from flax import nnx
from tiny import random_model, relative_error

from mlra_jax.config import GroupedConfig, LatentConfig, TiedConfig
from mlra_jax.sharding import make_mesh

EPS, BASE = 1e-2, 300.0
"""Not the defaults, and large enough to matter."""


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(x, scale, factor=1.0):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * scale * factor


def rope(x_THR):
    T, half = len(x_THR), x_THR.shape[-1] // 2
    angle = np.arange(T)[:, None, None] * BASE ** (-np.arange(half) / half)
    x1, x2 = x_THR[..., :half], x_THR[..., half:]
    turned = [x1 * np.cos(angle) - x2 * np.sin(angle), x1 * np.sin(angle) + x2 * np.cos(angle)]
    return np.concatenate(turned, -1)


def softmax_attention(q_TK, k_TK, v_TV):
    """One head, causal, scaled by the width of a query."""
    scores = q_TK @ k_TK.T / np.sqrt(q_TK.shape[-1])
    weights = np.exp(scores) * np.tri(len(q_TK))
    return weights / weights.sum(-1, keepdims=True) @ v_TV


def latent(a: LatentConfig, w, x_TD):
    D, H, L = x_TD.shape[1], a.num_heads, a.groups * a.branches
    factor = lambda width: np.sqrt(D / width) if a.scaled else 1.0
    cq = norm(x_TD @ w["q_down"], w["q_norm"], factor(a.q_latent_dim))
    q_THK = np.einsum("tq,qhk->thk", cq, w["q_up"])
    q_nope, q_rope = q_THK[..., : a.nope_dim], rope(q_THK[..., a.nope_dim :])
    k_rope = rope((x_TD @ w["k_rope"])[:, None])[:, 0]
    C = a.latent_dim // L
    chunks, scales = np.split(x_TD @ w["kv_down"], L, -1), np.split(w["kv_norm"], L)
    c = [norm(chunk, scale, factor(C)) for chunk, scale in zip(chunks, scales, strict=True)]
    kv = a.num_kv_heads or H
    out = np.zeros((a.branches + 1, len(x_TD), H, a.nope_dim))
    for h in range(H):
        q = np.concatenate([q_nope[:, h], q_rope[:, h]], -1)

        def attended(latent, k_up, v_up, q=q):
            return softmax_attention(q, np.concatenate([latent @ k_up, k_rope], -1), latent @ v_up)

        for r in range(a.branches):
            up = r * kv + h // (H // kv)
            latent = c[r * a.groups + h // (H // a.groups)]
            out[r, :, h] = attended(latent, w["k_up"][up], w["v_up"][up])
        if a.base_dim:
            base = norm(x_TD @ w["base_down"], w["base_norm"], factor(a.base_dim))
            out[-1, :, h] = attended(base, w["base_k_up"][h], w["base_v_up"][h])
    branches = a.branches + (a.base_dim > 0)
    if a.branch_gated:
        odds = np.exp(np.einsum("td,drh->rth", x_TD, w["branch_gate"]))
        out = out[:branches] * (branches * odds / odds.sum(0))[..., None]
    return out.sum(0) / (np.sqrt(branches) if a.scaled else 1.0)


def by_head(q_THK, k_TJK, v_TJV):
    group = q_THK.shape[1] // k_TJK.shape[1]
    heads = [
        softmax_attention(q_THK[:, h], k_TJK[:, h // group], v_TJV[:, h // group])
        for h in range(q_THK.shape[1])
    ]
    return np.stack(heads, 1)


def grouped(a: GroupedConfig, w, x_TD):
    q, k, v = (np.einsum("td,dhk->thk", x_TD, w[n]) for n in "qkv")
    return by_head(rope(q), rope(k), v)


def tied(a: TiedConfig, w, x_TD):
    half = a.head_dim // 2
    q, kv = (np.einsum("td,dhk->thk", x_TD, w[n]) for n in ("q", "kv"))
    q = np.concatenate([q[..., :half], rope(q[..., half:])], -1)
    k_rope = np.repeat(rope((x_TD @ w["k_rope"])[:, None]), a.num_kv_heads, 1)
    return by_head(q, np.concatenate([kv[..., :half], k_rope], -1), kv)


def multi_matrix(a, w, x_TD):
    q = np.einsum("tq,qhk->thk", norm(x_TD @ w["q_down"], w["q_norm"]), w["q_up"])
    return by_head(rope(q), rope((x_TD @ w["k"])[:, None]), (x_TD @ w["v"])[:, None])


def tensor_product(a, w, x_TD):
    def product(name, rank, turn):
        factor_a, factor_b = (np.einsum("td,dxy->txy", x_TD, w[f"{name}_{f}"]) for f in "ab")
        return np.einsum("thr,trk->thk", factor_a, turn(factor_b)) / rank

    same = lambda x: x
    return by_head(
        product("q", a.q_rank, rope), product("k", a.rank, rope), product("v", a.rank, same)
    )


MECHANISMS = dict(
    latent=latent,
    grouped=grouped,
    tied=tied,
    multi_matrix=multi_matrix,
    tensor_product=tensor_product,
)


def decoder(config, weights, tokens_T):
    """float64 logits `[T, V]`; `weights` by path, the layers' stacked."""
    a, table = config.attention, weights["embed", "embedding"]
    x_TD = table[tokens_T]
    for i in range(config.num_layers):
        layer = {path[1:-1]: x[i] for path, x in weights.items() if path[0] == "layers"}
        w = {path[1]: x for path, x in layer.items() if path[0] == "attention"}
        y_TD = norm(x_TD, layer[("attention_norm",)])
        o_THK = MECHANISMS[a.kind](a, w, y_TD)
        if "gate" in w:
            o_THK = o_THK * sigmoid(np.einsum("td,dhk->thk", y_TD, w["gate"]))
        x_TD = x_TD + np.einsum("thk,hkd->td", o_THK, w["out"])
        y_TD = norm(x_TD, layer[("mlp_norm",)])
        gate = y_TD @ layer["mlp", "gate"]
        x_TD = x_TD + (gate * sigmoid(gate) * (y_TD @ layer["mlp", "up"])) @ layer["mlp", "down"]
    return norm(x_TD, weights["final_norm", "scale"]) @ table.T


@pytest.mark.parametrize("name", [*tiny.ALL, "gla_2_gated", "uneven"])
def test_logits_are_those_of_the_definitions(name):
    extra = {
        "gla_2_gated": LatentConfig(groups=2, branches=1, gated=True, **tiny.SIZES),
        "uneven": LatentConfig(groups=3, branches=2, **tiny.SIZES | dict(num_heads=6)),
    }
    config = tiny.config(extra.get(name, name), num_layers=2, norm_eps=EPS, rope_base=BASE)
    model = random_model(config, make_mesh(), seed=7)
    state = nnx.to_flat_state(nnx.state(model))
    weights = {path: np.asarray(x[...], np.float64) for path, x in state}
    tokens = np.random.default_rng(1).integers(0, tiny.VOCAB, (2, 9), np.int32)
    want = [decoder(config, weights, row) for row in tokens]
    assert relative_error(whole_pass(model, tokens), want) < 1e-5
