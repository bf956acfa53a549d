"""How much is computed at a time, by platform: the sizes of the blocks of all equations.

A block bounds the temporaries of an equation. On CPU it is what the caches hold. On GPU and TPU it
is a share of the memory, so that few large kernels run. No size grows with the batch.

GPU: one H100 80GB, JAX 0.11.2, 2026-11-27 and 2026-11-28, steps of training at earlier commits; no
other GPU was measured. TPU: compiled for a v5e by JAX 0.10.2 (experiments/block_sizes.py
--topology=v5e:1x1), not timed. The same script times the sizes on a device.
"""

from typing import NamedTuple

from lmn_jax.distributed import mesh as meshes


class BlockSizes(NamedTuple):
  """The sizes of one platform; scores and hidden units are float32, 4 bytes each.

  unit_pairs: pairs of position and query of one example in a block of target attention.
  unit_positions: the least positions of such a block, so that products are large for many queries.
  unit_floats: hidden units of such a block.
  export_chunks: equal pieces of positions in an export, where the number of queries is not known; 0
  for pieces of `unit_positions` or, where the length is known, of `export_units` numbers, positions
  times hidden units.
  attention_whole: scores of self-attention that are in memory together; above, examples are
  processed in blocks, which the gradient recomputes. attention_block: scores of such a block.
  causal_pieces: pieces of the queries of causal self-attention, each with the keys up to its end.
  fused_positions: the least length for which a kernel of JAX computes causal self-attention; 0 if
  none does. It has no array of scores.
  loss_positions, loss_scores: the most positions, and scores of items, of a block of the softmax
  loss over all items.
  ranking_scores: scores in memory together when all items are ranked.
  bag_rows, bag_floats: the most rows that a weighted read gathers together, and their numbers.
  key_group: keys of a block whose gradients are one expression (product_keys.py).
  shard_reads: the least reads of a round of a sharded table (tables/embedding_bag.py).
  owner_rows: rows of a table up to which reads of equal ids are found by an array of all rows, in
  place of a hash table with more turns (`table.owners`).
  """

  unit_pairs: int
  unit_positions: int
  unit_floats: int
  export_chunks: int
  export_units: int
  attention_whole: int
  attention_block: int
  causal_pieces: int
  fused_positions: int
  loss_positions: int
  loss_scores: int
  ranking_scores: int
  bag_rows: int
  bag_floats: int
  key_group: int
  shard_reads: int
  owner_rows: int


CPU = BlockSizes(
  # A step of DIN over 1,000 events takes half the time of one without blocks (the log, `sam_scan`).
  unit_pairs=2**11,
  unit_positions=64,
  unit_floats=2**19,
  export_chunks=0,
  export_units=2**13,
  attention_whole=2**22,
  attention_block=2**19,
  # Causal attention needs half of all pairs of positions; in four pieces it is five eighths.
  causal_pieces=4,
  fused_positions=0,
  # 256 positions are one block for up to 8 million items.
  loss_positions=2**8,
  loss_scores=2**31,
  ranking_scores=2**22,
  bag_rows=8,
  bag_floats=2**31,
  key_group=1,  # each is added in place; more would be an array in memory
  shard_reads=1,
  owner_rows=0,  # an array of all rows would have to be cleared in every step
)

GPU = BlockSizes(
  # SAM, 2,048 histories of 1,000 events, 2^25 hidden units: 18.4 ms a step with 2^19 a block, 9.2
  # with 2^23, 4.9 in one block. 2^26 are 256 MiB.
  unit_pairs=2**20,
  unit_positions=64,
  unit_floats=2**26,
  # 32 users with 1,024 candidates, 1,000 events and 16 hidden units: 512 MiB; not timed.
  export_chunks=4,
  export_units=0,
  # SASRec, 256 lanes of 200 events, 2^24.3 scores a layer, is faster in one block (20.7 ms a step
  # with the CPU's sizes, 4.4 without blocks). 2^27 are 512 MiB.
  attention_whole=2**27,
  attention_block=2**27,
  # The same step: 4.4 ms in four pieces and 4.5 in one, compiled in 26.6 and 9.7 s.
  causal_pieces=1,
  # cuDNN's attention takes packed sequences only as a bias [B, 1, T, T], whose gradient it computes
  # too, and it cannot be lowered without a GPU. [not used]
  fused_positions=0,
  # The same step, 3,417 items: 13.0 ms with 256 positions, 5.9 with 4,096 and 4.4 with all 51,200,
  # 2^27.4 scores. 2^28 are 1 GiB.
  loss_positions=2**20,
  loss_scores=2**28,
  ranking_scores=2**27,  # not timed; 512 MiB
  bag_rows=32,  # not timed; the sum is one kernel for up to 32 rows, without a loop
  bag_floats=2**28,
  key_group=32,  # not timed; XLA fuses the gathers into the sum, and the products into one scatter
  shard_reads=2**10,  # as on TPU; not timed
  # Before each turn the host waits for the condition of the loop. 2^25 rows are cleared in 50 us at
  # 3 TB/s; not timed.
  owner_rows=2**25,
)

TPU = BlockSizes(
  # 2,048 histories of 1,000 events, gradient included: in one block 402 MiB of temporaries and 2.2
  # GB of traffic; in blocks of 2^22, 257 MiB and more traffic.
  unit_pairs=2**20,
  unit_positions=64,
  unit_floats=2**24,
  export_chunks=4,
  export_units=0,
  # 256 sequences of 200 events, gradient included: 1.6 GB of traffic and 34 s of compilation in one
  # piece; 2.0 GB and 120 s in four. 2^25 are 128 MiB.
  attention_whole=2**25,
  attention_block=2**25,
  causal_pieces=1,
  # Gradient included, the kernel and one block of scores: 2.6 and 6.6 GB of traffic for 64
  # sequences of 1,000 events; 2.2 and 1.6 GB for 256 of 200, which the kernel pads.
  fused_positions=512,
  # 51,200 positions, 3,417 items: no temporaries in HBM with 2^24, whose scores fit in VMEM; 309
  # MiB with 2^26, 670 with 2^28.
  loss_positions=2**20,
  loss_scores=2**24,
  ranking_scores=2**25,
  # 4,096 reads of 32 rows, gradient included: with 8 rows at a time no temporaries in HBM; with 16
  # or 32 all gathered rows, 33 MiB; the same traffic.
  bag_rows=8,
  bag_floats=2**24,
  key_group=1,
  # The instructions of a round take longer than so many rows: on 256 chips a table of a few rows
  # has all of its reads on a few shards, which would need up to 128 rounds (docs/how_to/plan.md).
  shard_reads=2**10,
  owner_rows=0,
)

SIZES = {'cpu': CPU, 'gpu': GPU, 'tpu': TPU}


def sizes() -> BlockSizes:
  """Returns the sizes of the platform for which functions are traced (`meshes.platform`)."""
  return SIZES[meshes.platform()]
