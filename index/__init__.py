"""float16 nearest neighbours over replies: vectors and rows, never who made them. Read `replies.py` first."""

from index.build import BuildInvalid, Entry, build
from index.exact import ExactIndex
from index.filters import Filters
from index.items import Items, ReplyItem
from index.replies import Hit, Replies
from index.search import Hits, Index, QueryInvalid
from index.shard import IndexInvalid
from index.sharded import ShardedIndex

__all__ = [
    "BuildInvalid",
    "Entry",
    "ExactIndex",
    "Filters",
    "Hit",
    "Hits",
    "Index",
    "IndexInvalid",
    "Items",
    "QueryInvalid",
    "Replies",
    "ReplyItem",
    "ShardedIndex",
    "build",
]
