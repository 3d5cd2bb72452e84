"""Compress a book once, keep it on disk, talk about it. The first run fetches the default model (about 100 MB)."""

from activation_beacon import BeaconCache, ChatPrompt, Conversation, load
from activation_beacon.books import read_demo_book

model, tokenizer = load("default")

context = model.compress([ChatPrompt(tokenizer).opening(read_demo_book())], ratio=8, progress=True)
print(context)

context.save("book.beacon")
context = BeaconCache.load("book.beacon", model)

conversation = Conversation(model, tokenizer, context)
print(conversation.ask("Who is the story about?", max_new_tokens=40))
print(conversation.ask("What do they do?", max_new_tokens=40))  # goes on from there: nothing is read again
