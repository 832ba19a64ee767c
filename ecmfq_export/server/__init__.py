"""An OpenAI-compatible chat endpoint over one model: HTTP in, a bounded queue, one model thread, HTTP out."""
