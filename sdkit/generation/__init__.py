"""Prompts to checked, saved images and one record: nothing invalid reaches the disk."""

from sdkit.generation.provenance import read_provenance
from sdkit.generation.record import ImageRecord, RunRecord
from sdkit.generation.run import generate

__all__ = ["ImageRecord", "RunRecord", "generate", "read_provenance"]
