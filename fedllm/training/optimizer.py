"""AdamW over one flat vector: a dozen kernels a step, whatever the number of layers."""

import torch

from fedllm.types import LocalTraining

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class FlatAdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with clipping of the whole gradient; steps in place.

    State is fresh for every client and round: a client keeps nothing between rounds.
    """

    def __init__(self, vector: torch.Tensor, training: LocalTraining):
        self.vector = vector
        self.training = training
        self.mean = torch.zeros_like(vector)
        self.square = torch.zeros_like(vector)
        self.num_steps = 0

    def step(self, grad: torch.Tensor) -> None:
        """Update the vector [P] with the gradient [P], which is clipped in place."""
        training = self.training
        if training.clip_norm:
            grad.mul_((training.clip_norm / (torch.linalg.vector_norm(grad) + 1e-6)).clamp(max=1.0))
        self.num_steps += 1
        self.mean.lerp_(grad, 1 - BETA1)
        self.square.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        correction1 = 1 - BETA1**self.num_steps
        correction2 = 1 - BETA2**self.num_steps
        denominator = self.square.sqrt().div_(correction2**0.5).add_(EPSILON)
        self.vector.mul_(1 - training.learning_rate * training.weight_decay)
        self.vector.addcdiv_(self.mean, denominator, value=-training.learning_rate / correction1)
