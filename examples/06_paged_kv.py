"""A padded page table (one row per request) and the compact form (CSR) that plan() takes."""

import torch

import cute_infer

device = "cuda:0" if torch.cuda.is_available() else "cpu"

page_size = 16  # tokens per page
num_pages = 128
num_heads = 32
head_dim = 128

# Layout "NHD": [num_pages, page_size, num_heads, head_dim]
paged_k = torch.randn(num_pages, page_size, num_heads, head_dim, dtype=torch.float16, device=device)
paged_v = torch.randn(num_pages, page_size, num_heads, head_dim, dtype=torch.float16, device=device)

# Request i may use up to eight pages: pages 8 i to 8 i + 7.
batch_size = 4
max_pages_per_seq = 8
page_table = torch.arange(batch_size * max_pages_per_seq, dtype=torch.int32, device=device).view(batch_size, max_pages_per_seq)
num_pages_per_seq = torch.tensor([8, 6, 7, 8], dtype=torch.int32, device=device)

print(f"Paged KV-Cache shape: {paged_k.shape}")
print(f"Page table shape: {page_table.shape}")
print(f"Pages per sequence: {num_pages_per_seq}")

# CSR: the used entries of all rows in one list (indices), and where each row starts in it (indptr).
table = cute_infer.from_page_table(page_table, page_size=page_size, num_pages_per_seq=num_pages_per_seq)

wrapper = cute_infer.BatchDecodeWithPagedKVCacheWrapper()
wrapper.plan(table.indptr, table.indices, table.last_page_len, num_heads, num_heads, head_dim, page_size)
output = wrapper.run(torch.randn(batch_size, num_heads, head_dim, dtype=torch.float16, device=device), (paged_k, paged_v))
print(f"Attention output shape: {output.shape}")
