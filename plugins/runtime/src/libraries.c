/* dlopen, and where it looks: what the caller names, the folder of this library, the system's own search. */
#define _GNU_SOURCE /* dladdr */
#include "libraries.h"

#include <dirent.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

int library_in(const char *folder, const char *prefix, char out[PATH_MOST]) {
  char best[256] = "";
  DIR *listing = opendir(folder);
  if (!listing) return 0;
  for (struct dirent *entry; (entry = readdir(listing));)
    if (!strncmp(entry->d_name, prefix, strlen(prefix)) && (!*best || strcmp(entry->d_name, best) < 0))
      snprintf(best, sizeof best, "%s", entry->d_name);
  closedir(listing);
  return *best && bundle_path(folder, best, out, NULL) == JPQ_SUCCESS;
}

int library_beside(const char *prefix, char out[PATH_MOST]) {
  static const char here = 0; /* lies in this library */
  char folder[PATH_MOST];
  Dl_info info;
  if (!dladdr(&here, &info) || !info.dli_fname || strlen(info.dli_fname) >= sizeof folder) return 0;
  strcpy(folder, info.dli_fname);
  char *slash = strrchr(folder, '/');
  if (!slash) return library_in(".", prefix, out);
  *slash = 0;
  return library_in(*folder ? folder : "/", prefix, out);
}

jpq_result library_open(const char *asked, const char *prefix, const char *otherwise, void **out, jpq_error *error) {
  char path[PATH_MOST];
  struct stat info;
  if (asked) {
    if (stat(asked, &info) == 0 && S_ISDIR(info.st_mode)) {
      if (!library_in(asked, prefix, path))
        return jpq_fail(error, JPQ_BACKEND, "%s: no %s* in it; give the path of the library itself", asked, prefix);
    } else if (snprintf(path, sizeof path, "%s", asked) >= (int)sizeof path) {
      return jpq_fail(error, JPQ_BAD_ARGUMENT, "library: path longer than %d bytes; give a shorter one", PATH_MOST);
    }
  } else if (!library_beside(prefix, path)) {
    snprintf(path, sizeof path, "%s", otherwise);
  }
  *out = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (*out) return JPQ_SUCCESS;
  const char *why = dlerror();
  return jpq_fail(error, JPQ_BACKEND, "%s: cannot be loaded (%s); set `library` to the path of %s", path,
                  why ? why : "no reason given", otherwise);
}

int library_find(const char *name, void **out) { return (*out = dlopen(name, RTLD_NOW | RTLD_LOCAL)) != NULL; }

void library_close(void *library) {
  if (library) dlclose(library);
}

void library_symbol(void *library, const char *name, void *out) {
  void *found = dlsym(library, name);
  memcpy(out, &found, sizeof found);
}
