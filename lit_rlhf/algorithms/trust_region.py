"""The natural-gradient step of trust region policy optimization (TRPO) on flat vectors of parameters.

Among all steps s with a mean KL of at most δ from the old policy, ½ sᵀ F s ≤ δ to second order, the one that improves
the surrogate L most to first order goes along the natural gradient x = F⁻¹ ∇L:

    s = √(2 δ / xᵀ F x) x

F, the Fisher matrix, has as many rows as the model has parameters and is never formed: conjugate gradients need only
its products with vectors. The line search then makes the bound hold exactly, and the surrogate improve.

Inner products are by `torch.dot`: under autocast, ``@`` would round both vectors and the result to half precision.

Source: Schulman et al. 2015 (arXiv 1502.05477), section 6 and appendix C.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All of them as one vector, [N].

    >>> flatten([torch.ones(1, 2), torch.zeros(1)])
    tensor([1., 1., 0.])
    """
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@torch.no_grad()
def assign(parameters: Sequence[Tensor], vector: Tensor) -> None:
    """Write a vector [N] into the parameters, in place: the inverse of `flatten`.

    Raises:
        ValueError: if it has not as many elements as they.

    >>> parameters = [torch.zeros(2), torch.zeros(1)]
    >>> assign(parameters, torch.tensor([1.0, 2.0, 3.0]))
    >>> parameters
    [tensor([1., 2.]), tensor([3.])]
    """
    sizes = [parameter.numel() for parameter in parameters]
    if sum(sizes) != len(vector):
        raise ValueError(f"a vector of {len(vector)} elements for {sum(sizes)} parameters")
    for parameter, piece in zip(parameters, vector.split(sizes), strict=True):
        parameter.copy_(piece.view_as(parameter))


def hessian_product(loss: Tensor, parameters: Sequence[Tensor], vector: Tensor) -> Tensor:
    """∇(∇loss · v): the loss's Hessian times a vector, by differentiating twice; the Hessian is never formed.

    Where the loss is the mean KL(π_θ ‖ sg π_θ) to the policy itself, held constant, this is the Fisher matrix's product
    F v: the KL's value and gradient are 0 there, and its Hessian is the mean of Σₐ π(a|s) ∇log π(a|s) ∇log π(a|s)ᵀ.

    Args:
        loss: [], a function of the parameters whose graph is there.
        parameters: Those that are differentiated by; one that the loss does not depend on counts 0.
        vector: [N], as long as all of them.

    Returns:
        [N].

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian_product((x**3).sum(), [x], torch.tensor([1.0, 1.0]))
    tensor([ 6., 12.])
    """
    gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    return flatten(torch.autograd.grad(torch.dot(flatten(gradient), vector), parameters, materialize_grads=True))


def conjugate_gradients(product: Product, b: Tensor, iterations: int = 10, tolerance: float = 1e-10) -> Tensor:
    """Solve A x = b for a symmetric positive definite A of which only the products with vectors are known.

    In exact arithmetic N iterations solve N equations; a few give the directions of A's largest eigenvalues.

    Source: Hestenes & Stiefel 1952; Nocedal & Wright 2006, algorithm 5.2.

    Args:
        product: v [N] ↦ A v [N].
        b: [N].
        iterations: At most so many, each one product.
        tolerance: Stop once |A x − b|² is at most this share of |b|².

    Returns:
        x, [N]; 0 where b is.

    >>> matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradients(lambda v: matrix @ v, torch.tensor([1.0, 2.0]))
    tensor([0.0909, 0.6364])
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction, squared = b.clone(), torch.dot(b, b)
    enough = tolerance * squared
    for _ in range(iterations):
        if squared <= enough:
            break
        image = product(direction)
        length = squared / torch.dot(direction, image)
        x += length * direction
        residual -= length * image
        last, squared = squared, torch.dot(residual, residual)
        direction = residual + squared / last * direction
    return x


def longest_step(direction: Tensor, product: Product, max_kl: float) -> Tensor:
    """The direction scaled so that the KL is at its bound to second order: s = √(2 δ / xᵀ F x) x.

    Args:
        direction: x, [N].
        product: v ↦ F v.
        max_kl: δ, in nats.

    Returns:
        s, [N]; 0 where the direction is.

    >>> longest_step(torch.tensor([1.0, 0.0]), lambda v: 8.0 * v, max_kl=0.01)
    tensor([0.0500, 0.0000])
    """
    curvature = torch.dot(direction, product(direction))
    return direction * (2.0 * max_kl / curvature).sqrt() if curvature > 0 else torch.zeros_like(direction)


def line_search(
    measure: Callable[[float], tuple[float, float]], max_kl: float, backtracks: int = 10, ratio: float = 0.5
) -> float:
    """The longest of the steps 1, ratio, ratio², … that improves the surrogate and keeps the KL within its bound.

    Args:
        measure: Share of the full step ↦ (improvement of the surrogate over the old policy, mean KL to it in nats).
        max_kl: δ, in nats.
        backtracks: Shares that are tried at most.
        ratio: Of one share to the one before, in (0, 1).

    Returns:
        The share; 0 if none of them will do.

    >>> line_search(lambda share: (share, share**2), max_kl=0.1)
    0.25
    """
    for k in range(backtracks):
        share = ratio**k
        improvement, kl = measure(share)
        if improvement > 0 and kl <= max_kl:  # comparisons with NaN are false
            return share
    return 0.0
