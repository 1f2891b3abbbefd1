// The threads of the kernels.
//
// They are torch's own wherever torch has loaded its OpenMP runtime for everybody, as it does on Linux: workers that it
// left spinning are put to work, and a library with a runtime of its own would have to wait for them. The runtime is
// looked for by name, so that a build needs none, and one wheel fits every torch. Elsewhere threads are made for a call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace {

// What of an OpenMP runtime is used, by the names that GNU's has and LLVM's and Intel's offer too.
struct OpenMP {
  using Parallel = void (*)(void (*work)(void*), void* with, unsigned threads, unsigned flags);
  using Number = int (*)();

  Parallel parallel = nullptr;
  Number this_thread = nullptr, threads = nullptr;

#if defined(__linux__)
  OpenMP()
      : parallel(reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"))),
        this_thread(reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"))),
        threads(reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"))) {}
#endif

  bool loaded() const { return parallel && this_thread && threads; }
};

// f(begin, end, thread) on contiguous parts of 0..count, as many as threads: the same number gives the same parts,
// whoever computes them.
template <class Function>
void parallel(int64_t count, int64_t threads, Function f) {
  threads = std::max<int64_t>(1, std::min(threads, count));
  if (threads == 1) return f(0, count, 0);
  static const OpenMP openmp;
  const auto part = [&](int64_t i) { f(count * i / threads, count * (i + 1) / threads, i); };
  if (openmp.loaded()) {
    const auto parts = [&] {  // a team may be smaller than asked for
      for (int64_t i = openmp.this_thread(); i < threads; i += openmp.threads()) part(i);
    };
    const auto work = [](void* with) { (*static_cast<decltype(&parts)>(with))(); };
    openmp.parallel(work, const_cast<void*>(static_cast<const void*>(&parts)), unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back([&part, i] { part(i); });
  part(0);
  for (auto& thread : others) thread.join();
}

}  // namespace
