"""Compress a book once, ask twice, keep it on disk. The first run fetches the default model (about 100 MB)."""

import torch

from activation_beacon import BeaconCache, ChatPrompt, load
from activation_beacon.books import read_demo_book

model, tokenizer = load("default")
prompt = ChatPrompt(tokenizer)

context = model.compress([prompt.opening(read_demo_book())], ratio=16, progress=True)
print(context)

context.save("book.beacon")
context = BeaconCache.load("book.beacon", model)

for question in ("Who is the story about?", "What do the Imps do?"):
    ids = torch.tensor([prompt.question(question)])
    out = model.generate(ids, context=context, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
