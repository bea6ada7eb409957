package nri

import (
	"context"
	"path"
	"strings"

	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/api"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// mountGeneration gives a container that has to do with templates its file of
// [checkpoint.GenerationMount]. A container that mounts something there itself,
// or below /run, is left as it is: so are all that are to be the same.
func (p *plugin) mountGeneration(ctx context.Context, c *api.Container, d Decision) *api.Mount {
	if p.runtimeDir == "" || d.Set[checkpoint.InternalPolicy] != string(checkpoint.PolicyTemplate) && d.Set[checkpoint.InternalTemplate] == "" {
		return nil
	}
	for _, m := range c.GetMounts() {
		dest := path.Clean(m.GetDestination())
		if dest == "/run" || dest == "/var/run" || dest == checkpoint.GenerationMount || strings.HasPrefix(dest, checkpoint.GenerationMount+"/") {
			return nil
		}
	}
	dir, err := checkpoint.GenerationDir(p.runtimeDir, c.GetId())
	if err == nil {
		err = checkpoint.NewGeneration(p.runtimeDir, c.GetId())
	}
	if err != nil {
		log.G(ctx).WithError(err).WithField("container_id", c.GetId()).Error("the container gets no generation")
		return nil
	}
	return &api.Mount{Destination: checkpoint.GenerationMount, Type: "bind", Source: dir,
		Options: []string{"rbind", "rprivate", "ro", "nosuid", "nodev", "noexec"}}
}

// RemoveContainer implements stub.RemoveContainerInterface.
func (c *connection) RemoveContainer(ctx context.Context, _ *api.PodSandbox, ctr *api.Container) error {
	defer c.metrics.request("RemoveContainer")()
	c.mu.Lock()
	delete(c.missed, ctr.GetId())
	c.mu.Unlock()
	if c.promoter != nil {
		c.promoter.forget(ctr.GetId())
	}
	if c.runtimeDir == "" {
		return nil
	}
	if err := checkpoint.RemoveGeneration(c.runtimeDir, ctr.GetId()); err != nil {
		log.G(ctx).WithError(err).WithField("container_id", ctr.GetId()).Warn("leftover of a removed container")
	}
	return nil
}
