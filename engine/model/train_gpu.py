"""Trains a larger byte-level Llama on a GPU and exports it: train_gpu.py [--minutes 7] [--out DIR] [--heldout heldout.txt].

Text: Python sources of permissively licensed packages that are on the machine, and generated retrieval text. Files named like
those in `heldout.txt`, and files that share a passage with it, are left out. DIR gets `model.safetensors` (f16, Hugging Face's
names), `config.json`, and `training.json` with what was measured on the exported weights: nll of the held-out text in nats per
byte, the share of retrieval questions answered right at each context, tokens seen, and the packages with their licences.

Needs PyTorch 2.9 or later. On a CPU it runs too, for as long as it is told to; only `--minutes` bounds it.
"""

import argparse
import glob
import importlib.metadata
import json
import math
import os
import random
import struct
import sysconfig
import time

import torch
import torch.nn.functional as F

# 3.9 M parameters, 7.8 MB in f16: deep rather than wide, since retrieval needs layers.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 576,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "float16",
    "bos_token_id": None,
    "eos_token_id": None,
}
WIDTH, HEADS, KV_HEADS, DIM = (
    CONFIG[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
)
# (share of the time, context): short contexts teach the language cheaply, long ones the distance. Each is compiled once.
PHASES = [(0.5, 1024), (1.0, 4096)]
TOKENS_PER_STEP = {"cuda": 262_144, "cpu": 8_192}
RETRIEVAL_SHARE = 0.2
HELDOUT = ("heapq.py", "textwrap.py", "csv.py", "queue.py", "sched.py", "tarfile.py", "statistics.py", "shelve.py", "fractions.py", "locks.py")
PERMISSIVE = ("mit", "bsd", "apache", "python software foundation", "psf", "isc", "zlib", "unlicense")


# ---- text


def licence(distribution):
    """The licence of an installed package if it is permissive, else nothing."""
    metadata = distribution.metadata
    words = [metadata.get("License-Expression") or "", (metadata.get("License") or "")[:100]]
    words += [value for key, value in metadata.items() if key == "Classifier" and value.startswith("License")]
    text = "; ".join(word for word in words if word).lower()
    refused = any(word in text for word in ("gpl", "proprietary", "nvidia", "mozilla", "other/"))
    return text if text and not refused and any(word in text for word in PERMISSIVE) else None


def python_files():
    """(package, licence, path) of every file that may be learnt from, in a fixed order."""
    library = sysconfig.get_paths()["stdlib"]
    for path in sorted(glob.glob(library + "/**/*.py", recursive=True)):
        if not any(part in path for part in ("/test/", "/tests/", "site-packages", "dist-packages", "idlelib", "lib2to3")):
            yield "python", "psf", path
    seen = set()
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: (d.metadata["Name"] or "").lower()):
        name, terms = distribution.metadata["Name"], licence(distribution)
        if not name or not terms or name in seen:
            continue
        seen.add(name)
        for file in sorted(map(str, distribution.files or [])):
            if file.endswith(".py") and not file.startswith("..") and not any(p in file for p in ("/test", "_vendor/")):
                yield name, terms, str(distribution.locate_file(file))


def corpus(heldout, most=200 << 20):
    """Bytes to learn from, and what they came from. Nothing of the held-out text is among them."""
    # Whole lines that hardly two files share by chance.
    marks = {line.strip() for line in heldout.splitlines() if len(line.strip()) >= 60}
    texts, sources, size, left_out = [], {}, 0, 0
    for package, terms, path in python_files():
        try:
            text = open(path, "rb").read()
        except OSError:
            continue
        if not 200 <= len(text) <= 1 << 20:
            continue
        if path.endswith(HELDOUT) or sum(line.strip() in marks for line in text.splitlines()) >= 2:
            left_out += 1
            continue
        texts.append(text)
        sources.setdefault(package, {"licence": terms[:80], "bytes": 0})["bytes"] += len(text)
        size += len(text)
        if size >= most:
            break
    random.Random(0).shuffle(texts)
    data = torch.frombuffer(bytearray(b"\n".join(texts)), dtype=torch.uint8)
    print(f"{len(texts)} files, {len(data) / 1e6:.1f} MB, {len(sources)} packages; {left_out} files left out as held out")
    return data, sources


def key(rng):
    """As the engine's retrieval test makes them."""
    return f"{rng.choice('abcdefghjkmnpqrstuvwxyz')}{rng.choice('aeiou')}{rng.choice('bcdfgklmnprstvz')}{rng.randrange(10)}"


def retrieval(rng, size):
    """`size` bytes: lines that set keys to five digits, in one block or mixed with lines that ask for them."""
    out, length, values, unasked = [], 0, {}, []
    in_blocks = rng.random() < 0.5
    wanted = rng.randrange(4, max(5, size // 30))
    while length < size:
        setting = len(values) < wanted if in_blocks else (not values or (len(values) < wanted and rng.random() < 0.4))
        if setting:
            name = key(rng)
            if name in values:
                continue
            values[name] = f"{rng.randrange(10**5):05d}"
            line = f"set {name} = {values[name]}\n"
        else:
            if not unasked:
                unasked = list(values)
                rng.shuffle(unasked)
            name = unasked.pop()
            line = f"get {name} -> {values[name]}\n"
        out.append(line)
        length += len(line)
    return "".join(out).encode()[:size]


def questions(rng, context):
    """A document as the engine's test plants it, and where the five digits of each answer start."""
    pairs = {}
    while len(pairs) * 16.2 + math.ceil(len(pairs) / 2) * 18 < context - 40:
        pairs.setdefault(key(rng), f"{rng.randrange(10**5):05d}")
    text = "".join(f"set {name} = {value}\n" for name, value in pairs.items())
    asked = list(pairs.items())
    rng.shuffle(asked)
    starts = []
    for name, value in asked[: math.ceil(len(asked) / 2)]:
        text += f"get {name} -> "
        starts.append(len(text))
        text += f"{value}\n"
    starts = [start for start in starts if start + 5 <= context]
    return text.encode()[:context], starts


# ---- model


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        linear = lambda rows, columns: torch.nn.Linear(columns, rows, bias=False)
        self.input_layernorm = torch.nn.RMSNorm(WIDTH, eps=CONFIG["rms_norm_eps"])
        self.post_attention_layernorm = torch.nn.RMSNorm(WIDTH, eps=CONFIG["rms_norm_eps"])
        self.q_proj, self.o_proj = linear(HEADS * DIM, WIDTH), linear(WIDTH, HEADS * DIM)
        self.k_proj, self.v_proj = linear(KV_HEADS * DIM, WIDTH), linear(KV_HEADS * DIM, WIDTH)
        inner = CONFIG["intermediate_size"]
        self.gate_proj, self.up_proj, self.down_proj = linear(inner, WIDTH), linear(inner, WIDTH), linear(WIDTH, inner)

    def forward(self, x, cos, sin):
        batch, tokens, _ = x.shape
        h = self.input_layernorm(x)
        heads = lambda y: y.view(batch, tokens, -1, DIM).transpose(1, 2)
        q, k, v = rotate(heads(self.q_proj(h)), cos, sin), rotate(heads(self.k_proj(h)), cos, sin), heads(self.v_proj(h))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(out.transpose(1, 2).reshape(batch, tokens, HEADS * DIM))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(CONFIG["vocab_size"], WIDTH)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = torch.nn.RMSNorm(WIDTH, eps=CONFIG["rms_norm_eps"])
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                torch.nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * len(self.layers)) if last else 1))

    def forward(self, tokens):
        """Logits [batch, tokens, 256] of tokens [batch, tokens]."""
        x = self.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
        frequencies = CONFIG["rope_theta"] ** (-torch.arange(0, DIM, 2, device=tokens.device) / DIM)
        angles = positions[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def rotate(x, cos, sin):
    """RoPE, half-split, in f32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


# ---- training


def optimizers(model):
    """Muon for the matrices of layers, AdamW for embedding and norms."""
    matrices = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.dim() != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original")
    adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=next(model.parameters()).is_cuda)
    return [(muon, 0.02), (adam, 3e-3)]


def rate(share, step):
    """Warm-up over 100 steps, then flat, then linear to 2 % over the last 40 % of the time."""
    return min(1.0, (step + 1) / 100) * min(1.0, 0.02 + 0.98 * (1 - share) / 0.4)


def train(model, data, minutes, device):
    rng, started, step, seen, average = random.Random(1), time.time(), 0, 0, None
    steppers = optimizers(model)
    forward = torch.compile(model, dynamic=False) if device == "cuda" else model
    data = data.to(device)
    while (share := (time.time() - started) / (60 * minutes)) < 1:
        context = next(context for until, context in PHASES if share < until or until == 1.0)
        rows = max(1, TOKENS_PER_STEP[device] // context)
        starts = torch.tensor([rng.randrange(len(data) - context - 1) for _ in range(rows)], device=device)
        batch = data[starts[:, None] + torch.arange(context + 1, device=device)]
        for row in range(rows):
            if rng.random() < RETRIEVAL_SHARE:
                batch[row] = torch.frombuffer(bytearray(retrieval(rng, context + 1)), dtype=torch.uint8)
        batch = batch.long()
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = forward(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, base in steppers:
            for group in optimizer.param_groups:
                group["lr"] = base * rate(share, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + rows * context
        if step % 50 == 0:
            average = loss.item()
            print(f"step {step} {share:.3f} context {context} loss {average:.4f} {seen / 1e6:.0f} M tokens", flush=True)
    return {"steps": step, "tokens": seen, "seconds": time.time() - started}


# ---- what came out


@torch.no_grad()
def measure(model, heldout, device):
    """Of the weights as exported, in f32."""
    text = torch.frombuffer(bytearray(heldout), dtype=torch.uint8).long().to(device)
    found = {}
    for context in (1024, 4096):
        windows = [text[at : at + context + 1] for at in range(0, len(text) - context, context)]
        losses = [F.cross_entropy(model(w[None, :-1])[0].float(), w[1:]).item() for w in windows]
        found[f"heldout_nll_{context}"] = sum(losses) / len(losses)
    for context in (1024, 2048, 4096):
        right = asked = 0
        for seed in range(20):
            document, starts = questions(random.Random(1000 + seed), context)
            tokens = torch.frombuffer(bytearray(document), dtype=torch.uint8).long().to(device)
            likeliest = model(tokens[None])[0].argmax(-1)
            for start in starts:
                asked += 1
                right += bool((likeliest[start - 1 : start + 4] == tokens[start : start + 5]).all())
        found[f"retrieval_{context}"] = right / asked
    return found


def exported(model):
    """Weights in f16 under Hugging Face's names."""
    weights = {"model.embed_tokens.weight": model.embed_tokens.weight, "model.norm.weight": model.norm.weight}
    for number, layer in enumerate(model.layers):
        for name, weight in layer.named_parameters():
            room = "self_attn." if name[:6] in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp." if "_proj" in name else ""
            weights[f"model.layers.{number}.{room}{name}"] = weight
    return {name: weight.detach().half().cpu().contiguous() for name, weight in weights.items()}


def save(weights, path):
    """The safetensors format: length of the header, header, data."""
    header, at = {}, 0
    for name, weight in weights.items():
        size = weight.numel() * 2
        header[name] = {"dtype": "F16", "shape": list(weight.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for weight in weights.values():
            file.write(weight.numpy().tobytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = os.path.dirname(os.path.abspath(__file__))
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--out", default=".")
    parser.add_argument("--heldout", default=os.path.join(here, "heldout.txt"))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    heldout = open(arguments.heldout, "rb").read()
    data, sources = corpus(heldout)
    model = Llama().to(device)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters} parameters, {2 * parameters / 1e6:.2f} MB in f16, on {device}", flush=True)
    run = train(model, data, arguments.minutes, device)
    weights = exported(model)
    os.makedirs(arguments.out, exist_ok=True)
    save(weights, os.path.join(arguments.out, "model.safetensors"))
    # The exported weights are rounded; what is measured is what is shipped.
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.half().float())
    result = run | measure(model, heldout, device) | {"parameters": parameters, "device": device, "torch": torch.__version__}
    with open(os.path.join(arguments.out, "config.json"), "w") as file:
        json.dump(CONFIG, file, indent=2)
        file.write("\n")
    with open(os.path.join(arguments.out, "training.json"), "w") as file:
        json.dump(result | {"sources": sources}, file, indent=1)
        file.write("\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
