"""The Bi-WKV4 operator: its Python face, its plain reference, and the build of its kernels."""
