"""From a student to a proved GGUF file, a transformers folder and an Ollama Modelfile."""
