"""Sources of captioned images, by the names that `conf/data` uses."""

from sdft.data.sources.folder import Folder
from sdft.data.sources.huggingface import HuggingFace
from sdft.data.sources.mix import Mix
from sdft.data.sources.shards import Shards
from sdft.data.sources.splits import Split, Subset, held_out
from sdft.data.sources.toy import Look, ToyWorld

__all__ = ["Folder", "HuggingFace", "Look", "Mix", "Shards", "Split", "Subset", "ToyWorld", "held_out"]
