// Work shared among the threads of the OpenMP runtime that PyTorch uses too: one pool, so the two never compete.
#pragma once

#include <atomic>
#include <cstdint>

// Calls body(first, last) over pieces of 0 .. n - 1, each index once; which thread takes which is left open.
template <class Body>
void share(int64_t n, int threads, int64_t piece, const Body& body) {
  if (n <= 0) return;
#if defined(_OPENMP)
  if (threads > 1 && n > piece) {
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    for (int64_t first; (first = next.fetch_add(piece, std::memory_order_relaxed)) < n;)
      body(first, first + piece < n ? first + piece : n);
    return;
  }
#endif
  (void)threads;
  body(0, n);
}
