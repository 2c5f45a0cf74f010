"""Absorbed decode by its definition, in NumPy's float64."""

import numpy as np


def absorbed_decode(q, q_rope, latents, k_rope, lengths_BT, starts_B, *, scale):
    """(out_BTLHC, lse_BTLH); query t of row b sees the positions `starts[b] <= s < lengths[b, t]`.

    Ends and starts may be any integers, `q_rope` is `[B, T, G, H, R]`. Without `q` the scores are
    those of the rotary keys, `[B, S, R]` or, one of each latent, `[B, S, L, R]`.
    """
    q_rope, latents, k_rope = (np.asarray(x, np.float64) for x in (q_rope, latents, k_rope))
    B, T, G, H, _ = q_rope.shape
    S, L, C = latents.shape[1:]
    q = np.zeros((B, T, L, H, C)) if q is None else np.asarray(q, np.float64)
    out, lse = np.zeros(q.shape), np.full((B, T, L, H), -np.inf)
    for b, t, latent in np.ndindex(B, T, L):
        first, end = max(0, int(starts_B[b])), min(S, int(lengths_BT[b][t]))
        if first >= end:
            continue
        c, k = latents[b, first:end, latent], k_rope[b, first:end]
        k = k if k.ndim == 2 else k[:, latent]
        scores = scale * (q[b, t, latent] @ c.T + q_rope[b, t, latent % G] @ k.T)
        top = scores.max(axis=1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(axis=1, keepdims=True)
        out[b, t, latent] = weights @ c / total
        lse[b, t, latent] = (top + np.log(total))[:, 0]
    return out, lse
