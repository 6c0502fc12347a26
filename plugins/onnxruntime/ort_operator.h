/* Answers that all our operators give onnxruntime about themselves. */
#ifndef JPQ_ORT_OPERATOR_H
#define JPQ_ORT_OPERATOR_H

#include "ort_api.h"

static inline const char *ORT_CALL on_the_cpu(const OrtCustomOp *op) {
  (void)op;
  return NULL;
}
static inline int ORT_CALL all_required(const OrtCustomOp *op, size_t i) {
  (void)op, (void)i;
  return ORT_REQUIRED;
}
static inline int ORT_CALL default_memory(const OrtCustomOp *op, size_t i) {
  (void)op, (void)i;
  return 0;
}
static inline int ORT_CALL one(const OrtCustomOp *op) {
  (void)op;
  return 1;
}
static inline int ORT_CALL none(const OrtCustomOp *op) {
  (void)op;
  return 0;
}
static inline int ORT_CALL a_float(const OrtCustomOp *op, size_t i) {
  (void)op, (void)i;
  return ORT_FLOAT;
}
static inline size_t ORT_CALL a_single(const OrtCustomOp *op) {
  (void)op;
  return 1;
}
static inline int ORT_CALL last_version(const OrtCustomOp *op) {
  (void)op;
  return 0x7fffffff;
}

#endif
