"""The process that looks at hostile picture bytes. Nothing in here may import torch, or anything of ours outside."""
