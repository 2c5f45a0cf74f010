"""Absorbed decode by its definition, in NumPy's float64."""

import numpy as np


def absorbed_decode(q, q_rope, latents, k_rope, lengths_BT, starts_B, *, scale):
    """(out_BTLHC, lse_BTLH); query t of row b sees the positions `starts[b] <= s < lengths[b, t]`.

    Ends and starts may be any integers, `q_rope` is `[B, T, G, H, R]`.
    """
    q, q_rope, latents, k_rope = (np.asarray(x, np.float64) for x in (q, q_rope, latents, k_rope))
    B, T, L, H, _ = q.shape
    S, G = latents.shape[1], q_rope.shape[2]
    out, lse = np.zeros(q.shape), np.full((B, T, L, H), -np.inf)
    for b, t, latent in np.ndindex(B, T, L):
        first, end = max(0, int(starts_B[b])), min(S, int(lengths_BT[b][t]))
        if first >= end:
            continue
        c, k = latents[b, first:end, latent], k_rope[b, first:end]
        scores = scale * (q[b, t, latent] @ c.T + q_rope[b, t, latent % G] @ k.T)
        top = scores.max(axis=1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(axis=1, keepdims=True)
        out[b, t, latent] = weights @ c / total
        lse[b, t, latent] = (top + np.log(total))[:, 0]
    return out, lse
