import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cute_infer.integrations.transformers import register

device = "cuda:0" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device != "cpu" else torch.float32

text = (
    "Beautiful is better than ugly. Explicit is better than implicit. Simple is better than complex. "
    "Complex is better than complicated. Flat is better than nested. Sparse is better than dense. Readability counts. "
)
letters = sorted(set(text))  # a token is a letter; 0 is padding

# A Llama small enough to learn the text by heart in seconds (grouped-query attention, RoPE); training needs eager attention.
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(letters) + 1, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    attn_implementation="eager",
)  # fmt: skip
model = LlamaForCausalLM(config).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
tokens = torch.tensor([letters.index(letter) + 1 for letter in text * 2], device=device)
for _ in range(150):
    rows = torch.stack([tokens[start : start + 64] for start in torch.randint(0, len(text), (16,))])
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"Trained: loss {loss.item():.2f}")
model = model.eval().to(dtype)

prompts = ["Beautiful is", "Flat is better", "Complex"]  # of different lengths: the batch is padded on the left
width = max(map(len, prompts))
ids = torch.tensor([[0] * (width - len(p)) + [letters.index(letter) + 1 for letter in p] for p in prompts], device=device)


def generate():
    return model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=48, do_sample=False)


expected = generate()
register()
model.set_attn_implementation("cute_infer")
generated = generate()
for row in generated.tolist():
    print("".join(letters[token - 1] for token in row if token))
print(f"The same tokens as eager attention: {torch.equal(generated, expected)}")
