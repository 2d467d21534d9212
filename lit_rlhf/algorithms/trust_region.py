"""The natural-gradient step of trust region policy optimization (TRPO), on flat parameter vectors.

Among all steps s with a mean KL of at most δ from the old policy (½ sᵀ F s ≤ δ to second order), the step with the
largest first-order improvement of the surrogate L is along the natural gradient x = F⁻¹ ∇L:

    s = √(2 δ / xᵀ F x) x

The Fisher matrix F has one row per parameter of the model and is never formed: the conjugate gradient method needs only
products of F with vectors. The line search then ensures that the measured KL is within the bound and that the surrogate
improves.

Inner products use `torch.dot`: under autocast, ``@`` would round both vectors and the result to half precision.

Source: Schulman et al. 2015 (arXiv 1502.05477), section 6 and appendix C.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""A function v [N] ↦ A v [N], which multiplies a matrix A by a vector."""


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate all elements of the tensors into one vector.

    Args:
        tensors: Tensors of any shapes, with N elements in total.

    Returns:
        The vector, [N].

    >>> flatten([torch.ones(1, 2), torch.zeros(1)])
    tensor([1., 1., 0.])
    """
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@torch.no_grad()
def assign(parameters: Sequence[Tensor], vector: Tensor) -> None:
    """Copy the elements of a vector into the parameters in place, as the inverse of `flatten`.

    Args:
        parameters: Parameters of any shapes, with N elements in total.
        vector: [N], the new values.

    Raises:
        ValueError: if the vector and the parameters differ in their number of elements.

    >>> parameters = [torch.zeros(2), torch.zeros(1)]
    >>> assign(parameters, torch.tensor([1.0, 2.0, 3.0]))
    >>> parameters
    [tensor([1., 2.]), tensor([3.])]
    """
    sizes = [parameter.numel() for parameter in parameters]
    if sum(sizes) != len(vector):
        raise ValueError(f"the vector has {len(vector)} elements, but the parameters have {sum(sizes)}")
    for parameter, values in zip(parameters, vector.split(sizes), strict=True):
        parameter.copy_(values.view_as(parameter))


def hessian_product(loss: Tensor, parameters: Sequence[Tensor], vector: Tensor) -> Tensor:
    """Compute the product of the loss's Hessian with a vector, ∇(∇loss · v), without forming the Hessian.

    If the loss is the mean KL(π_θ ‖ sg π_θ) from the policy to a constant copy of itself (sg is the stop-gradient), the
    result is F v with the Fisher matrix F: the value and the gradient of this KL are 0, and its Hessian is the mean of
    Σₐ π(a|s) ∇log π(a|s) ∇log π(a|s)ᵀ.

    Args:
        loss: [], the loss with its autograd graph.
        parameters: The parameters to differentiate with respect to, with N elements in total; the derivative is 0 for
            those that the loss does not depend on.
        vector: The vector v, [N].

    Returns:
        The product, [N].

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian_product((x**3).sum(), [x], torch.tensor([1.0, 1.0]))
    tensor([ 6., 12.])
    """
    gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    return flatten(torch.autograd.grad(torch.dot(flatten(gradient), vector), parameters, materialize_grads=True))


def conjugate_gradients(product: Product, b: Tensor, iterations: int = 10, tolerance: float = 1e-10) -> Tensor:
    """Solve A x = b for a symmetric positive definite A, given only products of A with vectors.

    In exact arithmetic, N iterations solve N equations; the first few iterations mainly resolve the directions of the
    largest eigenvalues.

    Source: Hestenes & Stiefel 1952; Nocedal & Wright 2006, algorithm 5.2.

    Args:
        product: The function v [N] ↦ A v [N].
        b: The right-hand side, [N].
        iterations: The maximum number of iterations, each of which needs one product.
        tolerance: The iterations stop once |A x − b|² is at most this fraction of |b|².

    Returns:
        x, [N]; 0 if b is 0.

    >>> matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradients(lambda v: matrix @ v, torch.tensor([1.0, 2.0]))
    tensor([0.0909, 0.6364])
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction, squared_norm = b.clone(), torch.dot(b, b)
    threshold = tolerance * squared_norm
    for _ in range(iterations):
        if squared_norm <= threshold:
            break
        a_direction = product(direction)
        step_size = squared_norm / torch.dot(direction, a_direction)
        x += step_size * direction
        residual -= step_size * a_direction
        previous, squared_norm = squared_norm, torch.dot(residual, residual)
        direction = residual + squared_norm / previous * direction
    return x


def longest_step(direction: Tensor, product: Product, max_kl: float) -> Tensor:
    """Scale a direction to the step whose KL, to second order, equals the bound: s = √(2 δ / xᵀ F x) x.

    Args:
        direction: The direction x, [N].
        product: The function v [N] ↦ F v [N].
        max_kl: The bound δ on the mean KL, in nats.

    Returns:
        The step s, [N]; 0 if xᵀ F x is not positive.

    >>> longest_step(torch.tensor([1.0, 0.0]), lambda v: 8.0 * v, max_kl=0.01)
    tensor([0.0500, 0.0000])
    """
    curvature = torch.dot(direction, product(direction))
    return direction * (2.0 * max_kl / curvature).sqrt() if curvature > 0 else torch.zeros_like(direction)


def line_search(
    measure: Callable[[float], tuple[float, float]], max_kl: float, backtracks: int = 10, ratio: float = 0.5
) -> float:
    """Find the largest fraction of a step, among 1, ratio, ratio², …, that improves the surrogate within the KL bound.

    Args:
        measure: A function that takes a fraction of the full step, and returns two numbers: the improvement of the
            surrogate over the old policy, and the mean KL to the old policy in nats.
        max_kl: The bound δ on the mean KL, in nats.
        backtracks: The maximum number of fractions to try.
        ratio: The ratio of each fraction to the one before, in (0, 1).

    Returns:
        The fraction; 0 if none of the fractions is accepted.

    >>> line_search(lambda fraction: (fraction, fraction**2), max_kl=0.1)
    0.25
    """
    for k in range(backtracks):
        fraction = ratio**k
        improvement, kl = measure(fraction)
        if improvement > 0 and kl <= max_kl:  # comparisons with NaN are false
            return fraction
    return 0.0
