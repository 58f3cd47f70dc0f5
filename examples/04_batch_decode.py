"""Eight requests of different lengths, one new token each, over a paged KV cache: plan once, run every layer."""

import torch

import cute_infer

device = "cuda:0" if torch.cuda.is_available() else "cpu"

batch_size = 8
num_qo_heads = 32
num_kv_heads = 32
head_dim = 128
page_size = 16

seq_lens = torch.tensor([128, 256, 512, 1024, 1500, 2000, 2048, 1800], device=device)

# A request of 1500 tokens needs 94 pages, not 93: round up, and say how many tokens its last page holds.
pages_per_request = (seq_lens + page_size - 1) // page_size
last_page_len = ((seq_lens - 1) % page_size + 1).int()
indptr = torch.zeros(batch_size + 1, dtype=torch.int32, device=device)
indptr[1:] = torch.cumsum(pages_per_request, dim=0)
num_pages = int(indptr[-1])  # 580
indices = torch.arange(num_pages, dtype=torch.int32, device=device)  # which page holds which part of which request

queries = torch.randn(batch_size, num_qo_heads, head_dim, dtype=torch.float16, device=device)
paged_k = torch.randn(num_pages, page_size, num_kv_heads, head_dim, dtype=torch.float16, device=device)
paged_v = torch.randn(num_pages, page_size, num_kv_heads, head_dim, dtype=torch.float16, device=device)

wrapper = cute_infer.BatchDecodeWithPagedKVCacheWrapper(kv_layout="NHD")
wrapper.plan(
    indptr=indptr,
    indices=indices,
    last_page_len=last_page_len,
    num_qo_heads=num_qo_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    page_size=page_size,
)
output = wrapper.run(queries, paged_k, paged_v)

print(f"Batch queries shape: {queries.shape}")
print(f"Batch output shape: {output.shape}")
