//go:build tools

// Package tools keeps the dependencies of critest, a test binary, in go.mod.
package tools

import (
	_ "github.com/kubernetes-sigs/cri-tools/pkg/benchmark"
	_ "github.com/kubernetes-sigs/cri-tools/pkg/validate"
)
