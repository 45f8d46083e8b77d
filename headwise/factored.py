"""Matrices of low rank, kept as two thin factors: OV and QK of a head are of this kind."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factored:
    """A matrix A @ B of shape [n, m] that is never multiplied out: A [n, d], B [d, m], d small."""

    A: Tensor
    B: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.A.shape[0], self.B.shape[1]

    @property
    def T(self) -> "Factored":
        """The transpose."""
        return Factored(self.B.T, self.A.T)

    def full(self) -> Tensor:
        """The matrix itself, [n, m]."""
        return self.A @ self.B

    def __matmul__(self, other: "Factored | Tensor") -> "Factored":
        if isinstance(other, Factored):
            return Factored(self.A, (self.B @ other.A) @ other.B)
        return Factored(self.A, self.B @ other)

    def __rmatmul__(self, other: Tensor) -> "Factored":
        return Factored(other @ self.A, self.B)

    def eigenvalues(self) -> Tensor:
        """The d eigenvalues that can differ from zero, complex [d]: those of B @ A. The matrix must be square."""
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"A matrix of shape {self.shape[0]} x {self.shape[1]} has no eigenvalues; use svd().")
        return torch.linalg.eigvals((self.B @ self.A).double())

    def norm(self) -> float:
        """Frobenius norm, from the two small Gram matrices."""
        square = ((self.A.T @ self.A).double() * (self.B @ self.B.T).double().T).sum()
        return float(square.clamp_min(0).sqrt())

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular vectors U [n, d], values S [d], and V [m, d], largest first."""
        q_left, r_left = torch.linalg.qr(self.A)
        q_right, r_right = torch.linalg.qr(self.B.T)
        u, s, vh = torch.linalg.svd(r_left @ r_right.T)
        return q_left @ u, s, q_right @ vh.T
