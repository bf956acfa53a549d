"""How much is computed at a time, by platform: the sizes of all blocks of equations, declared once.

A block bounds the temporaries of an equation. On CPU it is what the caches hold. On GPU and TPU it
is a share of the memory, so that few large kernels run; no size grows with the batch.
"""

from typing import NamedTuple

from lmn_jax.distributed import mesh as meshes


class BlockSizes(NamedTuple):
  """The sizes of one platform; scores and hidden units are float32.

  unit_pairs: pairs of position and query of one example in a block of target attention.
  unit_positions: the least positions of such a block, so that products are large for many queries.
  unit_floats: hidden units of such a block. export_units: positions times hidden units of a block
  in an export, where the number of queries is not known.
  attention_whole: scores of a self-attention that are in memory together; above, examples are
  processed in blocks, which the gradient recomputes. attention_block: scores of such a block.
  causal_pieces: pieces of the queries of causal self-attention, each with the keys up to its end.
  loss_positions, loss_scores: the most positions, and scores of items, of a block of the softmax
  loss over all items.
  ranking_scores: scores in memory together when all items are ranked.
  bag_rows, bag_floats: the most rows that a weighted read gathers together, and their numbers.
  """

  unit_pairs: int
  unit_positions: int
  unit_floats: int
  export_units: int
  attention_whole: int
  attention_block: int
  causal_pieces: int
  loss_positions: int
  loss_scores: int
  ranking_scores: int
  bag_rows: int
  bag_floats: int


SIZES = {
  'cpu': BlockSizes(
    # A step of DIN over 1,000 events takes half the time of one without blocks (the log, `sam_scan`
    # and `step_cost`; two CPU cores).
    unit_pairs=2**11,
    unit_positions=64,
    unit_floats=2**19,
    export_units=2**13,
    attention_whole=2**22,
    attention_block=2**19,
    # In four pieces, five eighths of all pairs of positions are computed; causal needs one half.
    causal_pieces=4,
    loss_positions=2**8,
    loss_scores=2**31,
    ranking_scores=2**22,
    bag_rows=8,
    bag_floats=2**31,
  ),
  'gpu': BlockSizes(
    unit_pairs=2**20,
    unit_positions=64,
    unit_floats=2**26,
    export_units=2**15,
    attention_whole=2**27,
    attention_block=2**27,
    causal_pieces=1,
    loss_positions=2**20,
    loss_scores=2**28,
    ranking_scores=2**27,
    bag_rows=32,
    bag_floats=2**28,
  ),
  'tpu': BlockSizes(
    unit_pairs=2**20,
    unit_positions=64,
    unit_floats=2**24,
    export_units=2**15,
    attention_whole=2**25,
    attention_block=2**25,
    causal_pieces=1,
    loss_positions=2**20,
    loss_scores=2**24,
    ranking_scores=2**26,
    bag_rows=8,
    bag_floats=2**24,
  ),
}


def sizes() -> BlockSizes:
  """Returns the sizes of the platform for which functions are traced (`meshes.platform`)."""
  return SIZES[meshes.platform()]
