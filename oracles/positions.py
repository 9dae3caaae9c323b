"""Positions that enter the scores, written from the papers in torch and run in float64.

T5's buckets are transformers' own function; no package was found for the others, so each is the paper's equation as a loop-free
matrix: not an independent implementation, but one that shares no code with ours.
"""

import math

import torch
import transformers
from common import Draw, golden
from transformers.models.t5.modeling_t5 import T5Attention

DIM, HEADS, TIME, BATCH = 32, 4, 21, 2
WIDTH = DIM // HEADS


def rotate(x, places, base=10000.0):
    """Half-split rotation of x [.., time, width] by places [time]."""
    theta = base ** (-2 * torch.arange(WIDTH // 2, dtype=torch.float64) / WIDTH)
    angle = places.double()[:, None] * theta
    a, b = x.chunk(2, -1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(name, config, extra, scores, causal=True, note="", reference="float64 matrices", versions=None):
    """`scores(q, k, p, distance)` gives [batch, heads, time, time] from heads [batch, heads, time, width], scaled."""
    d = Draw(name)
    p = {f"{n}_proj.weight": d.weight(DIM, DIM) for n in "qkvo"} | extra(d)
    distance = torch.arange(TIME)[:, None] - torch.arange(TIME)[None]

    def run(module, p, i):
        split = lambda w: (i["x"] @ p[f"{w}_proj.weight"].T).unflatten(2, (HEADS, WIDTH)).transpose(1, 2)
        logits = scores(split("q") / math.sqrt(WIDTH), split("k"), p, distance)
        if causal:
            logits = logits.masked_fill(distance < 0, float("-inf"))
        return (logits.softmax(-1) @ split("v")).transpose(1, 2).flatten(2) @ p["o_proj.weight"].T, {}

    golden(name, "attention", {"dim": DIM, "heads": HEADS, "causal": causal} | config, p, {"x": d.normal(BATCH, TIME, DIM)}, run,
           reference=reference, versions=versions or {}, note=note, script="positions.py")


def plain(q, k):
    return q @ k.transpose(-1, -2)


def t5(causal):
    buckets, far = 12, 10

    def scores(q, k, p, distance):
        ids = T5Attention._relative_position_bucket(-distance, bidirectional=not causal, num_buckets=buckets, max_distance=far)
        return plain(q, k) + p["position_bias"][ids].permute(2, 0, 1)

    attention("attention_t5" + ("" if causal else "_bidirectional"), {"position": "t5", "position_buckets": buckets, "position_distance": far},
              lambda d: {"position_bias": d.normal(buckets, HEADS)}, scores, causal, reference="transformers T5Attention's buckets",
              versions={"transformers": transformers.__version__}, note="scores are scaled by 1/sqrt(head_dim), which T5 leaves out")


def kerple(power):
    def scores(q, k, p, distance):
        far = distance.abs()[None].to(q.dtype)
        r1, r2 = p["kerple_r1"].exp()[:, None, None], p["kerple_r2"][:, None, None]
        if power:
            falls = torch.where(far > 0, far.clamp_min(1) ** (2 * r2.sigmoid()), 0.0)
        else:
            falls = torch.log(1 + r2.exp() * far)
        return plain(q, k) - r1 * falls

    attention("attention_kerple_" + ("power" if power else "log"), {"position": "kerple_power" if power else "kerple_log"},
              lambda d: {"kerple_r1": d.normal(HEADS, std=0.5, mean=-1.0), "kerple_r2": d.normal(HEADS, std=0.5)}, scores)


def fire():
    hidden = 32

    def scores(q, k, p, distance):
        c, longest = p["fire.scales"].exp()
        place = torch.arange(TIME, dtype=q.dtype)
        inputs = torch.log(c * distance.clamp_min(0).to(q.dtype) + 1) / torch.log(c * torch.maximum(place, longest) + 1)[:, None]
        inner = torch.relu(inputs[..., None] * p["fire.fc1.weight"][:, 0] + p["fire.fc1.bias"])
        return plain(q, k) + (inner @ p["fire.fc2.weight"].T).permute(2, 0, 1)

    extra = lambda d: {"fire.fc1.weight": d.normal(hidden, 1), "fire.fc1.bias": d.bias(hidden), "fire.fc2.weight": d.weight(HEADS, hidden),
                       "fire.scales": torch.tensor([-0.5, 2.0])}
    attention("attention_fire", {"position": "fire"}, extra, scores, note="L = e^2: both sides of max(i, L) occur")


def sandwich():
    def scores(q, k, p, distance):
        theta = 10000.0 ** (-2 * torch.arange(WIDTH // 2, dtype=torch.float64) / WIDTH)
        angle = torch.arange(TIME).double()[:, None] * theta
        waves = torch.cat([angle.sin(), angle.cos()], -1).to(q.dtype)
        return plain(q, k) + p["sandwich_factor"][:, None, None] * (waves @ waves.T)

    attention("attention_sandwich", {"position": "sandwich"}, lambda d: {"sandwich_factor": d.normal(HEADS)}, scores)


def xpos():
    def scores(q, k, p, distance):
        zeta = (2 * torch.arange(WIDTH // 2, dtype=torch.float64) / WIDTH + 0.4) / 1.4
        power = (zeta[None] ** (torch.arange(TIME).double()[:, None] / 512)).to(q.dtype).repeat(1, 2)
        place = torch.arange(TIME)
        return plain(rotate(q, place) * power, rotate(k, place) / power)

    attention("attention_xpos", {"position": "xpos"}, lambda d: {}, scores)


def rerope(leak):
    near = 5

    def scores(q, k, p, distance):
        theta = 10000.0 ** (-2 * torch.arange(WIDTH // 2, dtype=torch.float64) / WIDTH)
        at = distance.double()
        at = torch.where(at < near, at, near + (at - near) / leak if leak else torch.full_like(at, near))
        angle = at[..., None] * theta
        cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
        (a, b), (c, d) = q[..., :, None, :].chunk(2, -1), k[..., None, :, :].chunk(2, -1)
        return ((a * c + b * d) * cos + (a * d - b * c) * sin).sum(-1)

    attention("attention_rerope" + ("_leaky" if leak else ""), {"position": "rerope", "position_window": near, "position_group": leak},
              lambda d: {}, scores, note="the rotation of every pair by its own distance")


def self_extend():
    near, group = 6, 3

    def scores(q, k, p, distance):
        place = torch.arange(TIME)
        close = plain(rotate(q, place), rotate(k, place))
        coarse = place // group
        apart = plain(rotate(q, coarse + near - near // group), rotate(k, coarse))
        return torch.where(distance < near, close, apart)

    attention("attention_self_extend", {"position": "self_extend", "position_window": near, "position_group": group}, lambda d: {}, scores)


if __name__ == "__main__":
    t5(True)
    t5(False)
    kerple(False)
    kerple(True)
    fire()
    sandwich()
    xpos()
    rerope(0)
    rerope(4)
    self_extend()
