"""The exceptions of FusionAI, grouped by what the caller can do about them.

    FusionError                    everything below; the text says what was asked, found, and what to do
    ├── UserError                  the input is wrong: change it and run again
    │   ├── ConfigError            a job file, an option or an argument
    │   ├── DataError              training text, tokenizer or batch
    │   ├── TokenError             a join token is malformed, forged or expired
    │   ├── GraphError             a model cannot become an OP-DAG, or an OP-DAG is invalid
    │   └── CheckpointError        a checkpoint is corrupt, incomplete or of another model
    ├── PlacementError             no plan fits the pool: add memory or machines, or shrink the job
    ├── StorageError               a disk refused to write: free space and run again
    ├── NetworkError               a peer or a link failed: retrying, or another peer, may help
    │   ├── PeerTimeout            no answer within the deadline; the peer may still be alive
    │   ├── PeerLost               the connection is gone
    │   ├── AuthenticationError    the peer's key or capability is not the one required
    │   └── ProtocolError          the peer sent something malformed, oversized or of another version
    └── JobError                   a running job ended early: a compnode died, the loss is not finite
        └── SessionRefused         a machine has no room for one more session: another machine may

Every class carries the exit status that the command line reports for it.
"""

from __future__ import annotations


class FusionError(Exception):
    """Base of every error that FusionAI raises on purpose."""

    exit_status = 1


class UserError(FusionError):
    """The input is wrong; changing it helps, retrying does not."""

    exit_status = 2


class ConfigError(UserError):
    """A job file, option or argument is malformed; the text names the field."""


class DataError(UserError):
    """Training text, a tokenizer or a batch cannot be used."""


class TokenError(UserError):
    """A join token is malformed, forged or expired."""


class GraphError(UserError):
    """A model cannot be captured as an OP-DAG, or an OP-DAG breaks a rule."""


class CheckpointError(UserError):
    """A checkpoint is corrupt, incomplete, or belongs to another model."""


class PlacementError(FusionError):
    """No placement of the job on the pool meets its constraints."""

    exit_status = 3


class StorageError(FusionError):
    """The disk refused a write (full, read-only, too large)."""

    exit_status = 4


class NetworkError(FusionError):
    """A peer or a link failed."""

    exit_status = 5


class PeerTimeout(NetworkError):
    """No answer within the deadline; the peer may still be alive."""


class PeerLost(NetworkError):
    """The connection to the peer is gone."""


class AuthenticationError(NetworkError):
    """The peer's key or capability is not the one required."""


class ProtocolError(NetworkError):
    """The peer sent something malformed, oversized, or of an incompatible version."""


class JobError(FusionError):
    """A running job ended early."""

    exit_status = 6


class SessionRefused(JobError):
    """A machine has no room for one more session; another machine, or a shorter session, may help."""
