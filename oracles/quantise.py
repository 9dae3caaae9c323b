"""Quantised weights, written from the equations in float64.

No package that was found quantises in these forms on a CPU, so this is no other implementation but another way to the
same numbers: GPTQ as in its paper (Frantar et al., 2022, algorithm 1) through the inverse and its upper Cholesky factor,
columns as vectors; the rest line by line (rounding; AWQ's scaling, equation 4 of Lin et al., 2023, at one exponent; SmoothQuant,
equation 4 of Xiao et al., 2022, with both sides in 8 bits).
"""

import torch
from common import SEED, Draw, write

ROWS, OUT, IN, GROUP = 200, 24, 64, 16


def half(x):
    return x.to(torch.float16).to(torch.float64)


def steps(w, bits, zeros):
    """Scale and zero of groups in the last dimension."""
    low, high = w.amin(-1, keepdim=True).clamp_max(0), w.amax(-1, keepdim=True).clamp_min(0)
    if zeros:
        return half((high - low) / (2**bits - 1)), half(low)
    return half(torch.maximum(high, -low) / (2 ** (bits - 1) - 1)), torch.zeros_like(low)


def numbers(w, scale, zero, bits, zeros):
    first, last = (0, 2**bits - 1) if zeros else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return ((w - zero) / scale).round().clamp(first, last)


def nearest(w, bits, zeros, group):
    parts = w.unflatten(1, (-1, group))
    scale, zero = steps(parts, bits, zeros)
    return (numbers(parts, scale, zero, bits, zeros) * scale + zero).flatten(1)


def gptq(w, x, bits, zeros, group, by_size):
    w, h = w.clone(), x.T @ x
    order = torch.argsort(-h.diagonal(), stable=True) if by_size else torch.arange(IN)
    fixed = steps(w.unflatten(1, (-1, group)), bits, zeros)
    h = h + 0.01 * h.diagonal().mean() * torch.eye(IN)
    w, h = w[:, order], h[order][:, order]
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    out = torch.zeros_like(w)
    for i in range(IN):
        if by_size:
            scale, zero = (part[:, order[i] // group] for part in fixed)
        elif i % group == 0:
            scale, zero = steps(w[:, i : i + group], bits, zeros)
        out[:, i : i + 1] = numbers(w[:, i : i + 1], scale, zero, bits, zeros) * scale + zero
        error = (w[:, i] - out[:, i]) / u[i, i]
        w[:, i:] -= error[:, None] * u[i, i:]
    back = torch.empty_like(out)
    back[:, order] = out
    return back


def smoothed(w, x, alpha):
    s = (x.abs().amax(0) ** alpha / w.abs().amax(0).clamp_min(1e-5) ** (1 - alpha)).clamp_min(1e-5)
    s = s / (s.min() * s.max()).sqrt()
    assert torch.allclose((x / s) @ (w * s).T, x @ w.T)
    x = x / s
    token = x.abs().amax(1, keepdim=True) / 127
    return ((x / token).round() * token) @ nearest(w * s, 8, False, IN).T


def main():
    torch.set_default_dtype(torch.float64)
    d = Draw("quantise")
    w = d.weight(OUT, IN)
    size = torch.where(torch.arange(IN) % 13 == 5, 8.0, 1.0).float()
    x = (d.normal(ROWS, 6) @ d.normal(6, IN) + 0.3 * d.normal(ROWS, IN)) * size
    exact, wide = w.double(), x.double()
    tensors = {"weight": w, "x": x}
    for bits, zeros, name in [(8, False, "rtn8"), (4, False, "rtn4"), (4, True, "rtn4_zeros")]:
        tensors[name] = nearest(exact, bits, zeros, GROUP)
    tensors["gptq4"] = gptq(exact, wide, 4, False, GROUP, False)
    tensors["gptq4_zeros"] = gptq(exact, wide, 4, True, GROUP, False)
    tensors["gptq4_order"] = gptq(exact, wide, 4, False, GROUP, True)
    tensors["smoothed"] = smoothed(exact, wide, 0.5)
    errors = {k: ((v - exact) @ wide.T).pow(2).mean().item() for k, v in tensors.items() if v.shape == w.shape and k != "weight"}
    assert errors["gptq4"] < 0.5 * errors["rtn4"] and errors["gptq4_order"] < 0.5 * errors["rtn4"], errors
    provenance = {
        "reference": "the equations in float64", "versions": {"torch": torch.__version__}, "seed": SEED,
        "script": "oracles/quantise.py", "note": "groups of 16; smoothed: outputs, whole rows; others: what the weights stand for",
    }
    write("quantise", "quantise", {"group": GROUP, "alpha": 0.5}, tensors, provenance)
    print(errors)


if __name__ == "__main__":
    main()
