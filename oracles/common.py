"""Shared by the golden scripts: seeded parameters, gradients, and the safetensors file.

Each golden is computed twice with the reference implementation: in float64 (the reference's own
float32 casts are lifted to float64), which is stored as float32, and in plain float32, which must
agree. Parameters and inputs are exact float32 numbers in both.
"""

import contextlib
import json
import os
import pathlib
import platform
import zlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from safetensors.torch import load_file
from torch.func import functional_call

torch.set_num_threads(2)

GOLDENS = pathlib.Path(__file__).resolve().parent.parent / "crates" / "testkit" / "goldens"
MAX_BYTES = 300_000
SEED = 20240607


@contextlib.contextmanager
def float64_everywhere():
    """Makes `.float()`, `torch.float32` and the default dtype mean float64 for code run inside."""
    saved = (torch.float32, torch.float, torch.Tensor.float, torch.get_default_dtype())
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float, dtype = saved
        torch.set_default_dtype(dtype)


class Draw:
    """Seeded random float32 arrays; the stream depends on the golden's name only."""

    def __init__(self, name):
        self.rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])

    def _tensor(self, a):
        return torch.from_numpy(np.asarray(a, dtype=np.float32))

    def normal(self, *shape, std=1.0, mean=0.0):
        return self._tensor(mean + std * self.rng.standard_normal(shape))

    def weight(self, *shape):
        """A matrix or kernel, scaled by 1/sqrt(fan_in)."""
        fan_in = int(np.prod(shape[1:]))
        return self.normal(*shape, std=fan_in**-0.5)

    def bias(self, n):
        return self.normal(n, std=0.3)

    def gain(self, *shape):
        """A norm weight or skip: around one, never one."""
        return self.normal(*shape, std=0.3, mean=1.0)

    def uniform(self, *shape, low, high):
        return self._tensor(self.rng.uniform(low, high, shape))

    def dt_bias(self, n, low=0.01, high=1.0):
        """Inverse softplus of log-uniform step sizes."""
        dt = np.exp(self.rng.uniform(np.log(low), np.log(high), n))
        return self._tensor(dt + np.log(-np.expm1(-dt)))

    def ints(self, *shape, high):
        return torch.from_numpy(self.rng.integers(0, high, shape))


def _run(dtype, make, run, params, inputs, cotangent):
    p = {k: v.detach().to(dtype, copy=True).requires_grad_(True) for k, v in params.items()}
    i = {k: v.detach().to(dtype, copy=True).requires_grad_(True) if v.is_floating_point() else v for k, v in inputs.items()}
    module = make() if make is not None else None
    if module is not None:
        module = module.to(dtype)
    y, state = run(module, p, i)
    if cotangent is None:
        return y, None
    (y * cotangent.to(dtype)).sum().backward()
    out = {"y": y}
    out |= {f"state.{k}": v for k, v in state.items()}
    for k, v in i.items():
        if v.is_floating_point():
            out[f"grad.{k}"] = v.grad
    for k, v in p.items():
        assert v.grad is not None, f"{k} has no gradient"
        out[f"grad.w.{k}"] = v.grad
    return y, {k: v.detach() for k, v in out.items()}


def difference(a, b):
    """Largest difference, relative to the largest entry (entries under 1e-2 count as 1e-2)."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-2)).item()


def golden(name, mixer, config, params, inputs, run, make=None, *, buffers=(), reference, versions, note="",
           tolerance=3e-5, zero=(), script):
    """Writes `name.safetensors`.

    `run(module, params, inputs) -> (y, {state name: tensor})` calls the reference; `make()` builds its
    module. `buffers` names entries of `inputs` that are not differentiated and are stored as `w.NAME`.
    `zero` names results that are zero in exact arithmetic.
    """
    draw = Draw(name + "/cotangent")
    fixed = {k: inputs.pop(k) for k in buffers}

    def call(module, p, i):
        dtype = next(iter(p.values())).dtype if p else i["x"].dtype
        return run(module, p, i | {k: v.to(dtype) for k, v in fixed.items()})

    with float64_everywhere():
        shape = _run(torch.float64, make, call, params, inputs, None)[0].shape
    cotangent = draw.normal(*shape)
    with float64_everywhere():
        exact = _run(torch.float64, make, call, params, inputs, cotangent)[1]
    assert all(v.dtype == torch.float64 for v in exact.values()), {k: v.dtype for k, v in exact.items()}
    plain = _run(torch.float32, make, call, params, inputs, cotangent)[1]
    worst = max((difference(plain[k].double(), exact[k]), k) for k in exact if k not in zero)
    assert all(plain[k].abs().max() < 1e-4 for k in zero)
    assert worst[0] < tolerance, f"{name}: float32 and float64 runs differ: {worst}"
    vanishing = [k for k, v in exact.items() if not v.abs().max() > 1e-6]
    assert vanishing == list(zero), f"{name}: all zero: {vanishing}, expected {zero}"
    exact |= {k: torch.zeros_like(exact[k]) for k in zero}
    assert all(v.isfinite().all() for v in exact.values())

    tensors = {k: v for k, v in inputs.items()}
    tensors |= {f"w.{k}": v for k, v in params.items()} | {f"w.{k}": v for k, v in fixed.items()}
    tensors |= exact | {"cotangent": cotangent}
    provenance = {
        "reference": reference,
        "versions": versions | {"torch": torch.__version__, "python": platform.python_version()},
        "precision": "float64, stored as float32; the same code in float32 differs by at most %.1e (%s)" % worst,
        "seed": SEED,
        "script": f"oracles/{script}",
        "note": note,
    }
    write(name, mixer, config, tensors, provenance)
    print(f"{name:34} y {tuple(exact['y'].shape)}  float32 differs by {worst[0]:.1e} in {worst[1]}")
    return exact


def write(name, mixer, config, tensors, provenance):
    tensors = {k: (v.float() if v.is_floating_point() else v.long()).detach().contiguous().clone() for k, v in tensors.items()}
    metadata = {
        "mixer": mixer,
        "config": json.dumps(config, sort_keys=True, allow_nan=False),
        "provenance": json.dumps(provenance, sort_keys=True),
    }
    GOLDENS.mkdir(parents=True, exist_ok=True)
    path, part = GOLDENS / f"{name}.safetensors", GOLDENS / f".{name}.part"
    part.write_bytes(serialise(tensors, metadata))
    size = part.stat().st_size
    assert size < MAX_BYTES, f"{name}: {size} bytes"
    part.chmod(0o644)
    part.replace(path)


def serialise(tensors, metadata):
    """The safetensors format with everything in a fixed order, so that equal contents are equal files."""
    header, data = {"__metadata__": metadata}, b""
    for name in sorted(tensors, key=lambda n: (tensors[n].dtype != torch.int64, n)):
        t = tensors[name]
        raw = t.numpy().astype(t.numpy().dtype.newbyteorder("<")).tobytes()
        kind = {torch.float32: "F32", torch.int64: "I64"}[t.dtype]
        header[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, sort_keys=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def load(name):
    return load_file(GOLDENS / f"{name}.safetensors")


def call(module, params, *args, **kwargs):
    """Calls `module` with its parameters replaced by `params` (all of them, no others)."""
    own = {k for k, _ in module.named_parameters()}
    assert own == set(params), f"parameters differ: {sorted(own ^ set(params))}"
    for k, v in module.named_parameters():
        assert v.shape == params[k].shape, f"{k}: {tuple(v.shape)} and {tuple(params[k].shape)}"
    return functional_call(module, params, args, kwargs)
