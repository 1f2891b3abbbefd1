// The threads of the kernels.
//
// On Linux they are those of the OpenMP runtime that torch has loaded for everybody: workers that it left spinning are put
// to work, and a library with a runtime of its own would have to wait for them. Its functions are weak symbols, bound
// when a kernel library is loaded: a build needs no runtime, and one wheel fits every torch. Where there is none the
// parts are computed one after the other. On other systems threads are made for a call.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__linux__)
extern "C" {
// By the names that GNU's runtime has; LLVM's and Intel's have them too.
__attribute__((weak)) void GOMP_parallel(void (*work)(void*), void* with, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_num_threads();
}
#else
#include <thread>
#include <vector>
#endif

namespace {

// f(begin, end, thread) on contiguous parts of 0..count, as many as threads: the same number gives the same parts,
// whoever computes them.
template <class Function>
void parallel(int64_t count, int64_t threads, Function f) {
  threads = std::max<int64_t>(1, std::min(threads, count));
  const auto part = [&](int64_t i) { f(count * i / threads, count * (i + 1) / threads, i); };
#if defined(__linux__)
  if (threads > 1 && GOMP_parallel && omp_get_thread_num && omp_get_num_threads) {
    auto parts = [&] {  // a team may be smaller than asked for
      for (int64_t i = omp_get_thread_num(); i < threads; i += omp_get_num_threads()) part(i);
    };
    GOMP_parallel([](void* with) { (*static_cast<decltype(parts)*>(with))(); }, &parts, unsigned(threads), 0);
    return;
  }
  for (int64_t i = 0; i < threads; ++i) part(i);
#else
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back([&part, i] { part(i); });
  part(0);
  for (auto& thread : others) thread.join();
#endif
}

}  // namespace
