/* SPDX-License-Identifier: Apache-2.0 */
/* Binds to the oldest versions of symbols, so that a wheel built on a newer glibc runs on 2.28.
 *
 * setup.py puts this file before every source. A linker binds a function to the newest version that
 * the building system has. exp, log, log2 and pow got one in 2.29 and hypot in 2.35: without the
 * error codes of SVID, which nothing here reads. pthread_* got one in 2.34, when they moved from
 * libpthread to libc. Of the old versions the system that runs has the same code behind them.
 * A symbol that libc.so.6 of 2.28 lacks is found in libpthread.so.0, which OpenBLAS needs as well.
 * tests/test_glibc.py lists what the extension asks for.
 */
#ifndef SQ_OLD_GLIBC_H
#define SQ_OLD_GLIBC_H

#include <features.h>

#if defined(__GLIBC__) && defined(__x86_64__)
#define SQ_FIRST_GLIBC "GLIBC_2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define SQ_FIRST_GLIBC "GLIBC_2.17"
#endif

#ifdef SQ_FIRST_GLIBC
#define SQ_FIRST(name) __asm__(".symver " #name "," #name "@" SQ_FIRST_GLIBC)
SQ_FIRST(exp);
SQ_FIRST(log);
SQ_FIRST(log2);
SQ_FIRST(pow);
SQ_FIRST(hypot);
SQ_FIRST(pthread_attr_setstacksize);
SQ_FIRST(pthread_create);
SQ_FIRST(pthread_detach);
SQ_FIRST(pthread_join);
SQ_FIRST(pthread_key_create);
SQ_FIRST(pthread_mutex_trylock);
SQ_FIRST(pthread_once);
SQ_FIRST(pthread_setspecific);
#undef SQ_FIRST
#endif

#endif
