"""Index backpropagation: values, losses and gradients against autograd on the full softmax; the bound on memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vqcore_quant.ibq import IBQ


def build(**settings):
    torch.manual_seed(0)
    return IBQ(IBQ.Config(**({"codebook_size": 20, "latent_dim": 4} | settings)))


def latents(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(z, embed, temperature):
    """The paper's equations with the full matrix of latents x codes."""
    logits = z @ embed.T
    soft = logits.softmax(-1)
    hard = torch.nn.functional.one_hot(logits.argmax(-1), len(embed)).to(z)
    value, plain = (hard + soft - soft.detach()) @ embed, hard @ embed
    quant = (value - z).square().mean() + (plain.detach() - z).square().mean()
    quant = quant + 0.25 * (plain - z.detach()).square().mean()
    p = (logits / temperature).softmax(-1)
    mean = p.mean(0)
    entropy = -(p * p.log()).sum(-1).mean() + (mean * mean.log()).sum()
    return value, hard.argmax(-1), quant, entropy


@pytest.mark.parametrize("chunk_mib", [1e-6, 0.001, 8.0])
def test_against_the_whole_table(chunk_mib):
    quantizer = build(quant_weight=1.0, chunk_mib=chunk_mib, entropy_temperature=0.7, entropy_weight=0.3)
    weight = latents(35, 4, seed=5)
    z = latents(5, 7, 4).requires_grad_()
    out = quantizer(z)
    ours = (out.z_q.flatten(0, 1) * weight).sum() + sum(out.losses.values())
    grads = torch.autograd.grad(ours, [z, quantizer.embed])
    rows, embed = z.detach().flatten(0, 1).double(), quantizer.embed.detach().double()
    rows, embed = rows.requires_grad_(), embed.requires_grad_()
    value, codes, quant, entropy = oracle(rows, embed, 0.7)
    theirs = torch.autograd.grad((value * weight).sum() + quant + 0.3 * entropy, [rows, embed])
    assert torch.equal(out.codes.flatten(), codes)
    torch.testing.assert_close(out.z_q.flatten(0, 1), value.float())
    assert float(out.losses["ibq/quant"].detach()) == pytest.approx(float(quant.detach()), rel=1e-5)
    assert float(out.losses["ibq/entropy"].detach()) == pytest.approx(0.3 * float(entropy.detach()), abs=1e-5)
    torch.testing.assert_close(grads[0].flatten(0, 1), theirs[0].float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads[1], theirs[1].float(), rtol=1e-4, atol=1e-5)


def test_every_code_gets_a_gradient():
    quantizer = build(quant_weight=0.0, entropy_weight=0.0)
    out = quantizer(latents(1, 3, 4))
    (out.z_q.square().sum() + sum(out.losses.values())).backward()
    assert (quantizer.embed.grad.abs().sum(-1) > 0).all()
    assert len(out.codes.unique()) <= 3


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation creates."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // 4)
        return out


def test_no_table_of_latents_and_codes_forward_or_backward():
    quantizer = build(codebook_size=1024, chunk_mib=0.25)
    z = latents(1, 4096, 4).requires_grad_()
    with LargestTensor() as seen:
        out = quantizer(z)
        (out.z_q.square().sum() + sum(out.losses.values())).backward()
    assert (
        seen.numel <= 2**17
    )  # 64 rows of 1024 scores at a time, and the codes as int64; the full matrix would have 2**22 numbers


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_codebook():
    def kept(codebook_size):
        quantizer, sizes = build(codebook_size=codebook_size, chunk_mib=0.1), []
        z = latents(1, 2000, 4).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            quantizer(z)
        return max(sizes)

    assert kept(1000) <= 2000 * 5


def test_what_is_not_finite_behind_the_mask_reaches_no_gradient():
    torch.manual_seed(0)
    quantizer = IBQ(IBQ.Config(codebook_size=16, latent_dim=4))
    z = torch.randn(2, 3, 4)
    z[0, 1, 2] = float("nan")
    z.requires_grad_(True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 1] = False
    out = quantizer(z, mask)
    (out.z_q[mask].sum() + sum(out.losses.values())).backward()
    assert quantizer.embed.grad.isfinite().all() and z.grad.isfinite().all()
    assert quantizer.embed.grad.abs().sum() > 0
