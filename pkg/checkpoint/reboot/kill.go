package reboot

import (
	"context"
	"errors"
	"fmt"
	"sync"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
)

// kill ends the targets that the manifest calls dumped. Their shims kill them
// while they are frozen and keep the checkpoints. It does all it can and returns
// the errors joined.
func kill(ctx context.Context, targets []Target, m *Manifest) error {
	dumped := map[string]bool{}
	for _, e := range m.Containers {
		dumped[e.ContainerID] = e.Result == Dumped
	}
	errs := make([]error, len(targets))
	var wg sync.WaitGroup
	for i := range targets {
		if c := &targets[i].Container; dumped[c.ID] {
			wg.Go(func() { errs[i] = c.kill(ctx) })
		}
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (c *Container) kill(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	err := c.connect(ctx, func(ctx context.Context, t *ttrpc.Client) error {
		_, err := taskAPI.NewTTRPCTaskClient(t).Kill(ctx, &taskAPI.KillRequest{ID: c.ID, Signal: uint32(unix.SIGKILL)})
		return errgrpc.ToNative(err)
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("kill container %s: %w", c.ID, err)
	}
	return nil
}
