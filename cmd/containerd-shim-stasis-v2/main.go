// Command containerd-shim-stasis-v2 is containerd's runc shim with
// checkpoint on stop and restore on create. containerd starts it where a
// runtime of type io.containerd.runc.v2 names it as runtime_path.
package main

import (
	"context"

	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/manager"
	"github.com/containerd/containerd/v2/pkg/shim"

	stasis "github.com/stasis-containers/stasis/shim" // also registers the task service
)

func main() {
	if stasis.HoldMemory() {
		return
	}
	// The runtime's name stays that of runc: bundles, options and every tool
	// that knows io.containerd.runc.v2 go on working.
	shim.RunShim(context.Background(), stasis.NewManager(manager.NewShimManager("io.containerd.runc.v2")))
}
