"""float16 nearest neighbours over replies: vectors and rows, never who made them. Read `replies.py` first."""

from index.build import BuildInvalid, Entry, Writer, build
from index.exact import ExactIndex
from index.filters import Filters
from index.items import Items, Judged, ReplyItem
from index.layout import IndexInvalid
from index.replies import Hit, Replies, Retriever
from index.search import Hits, Index, QueryInvalid
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
    "Judged",
    "QueryInvalid",
    "Replies",
    "ReplyItem",
    "Retriever",
    "ShardedIndex",
    "Writer",
    "build",
]
