"""How well one model does on a user's data: answers, perplexity, retrieval; and how much of that another model keeps."""
