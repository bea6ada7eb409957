package shim

import (
	"context"

	"github.com/containerd/log"

	"github.com/stasis-containers/stasis/pkg/restore/pager"
)

// What clones of one version ask for when they begin to run is recorded; what some in a
// row have asked for is what the next one's memory is filled with first. Only templates
// have a record: all else is restored once.

func (s *service) hotFile(p *pendingRestore) string {
	m := p.claim.Manifest()
	if m.Template == "" {
		return ""
	}
	return pager.HotFile(s.config.RuntimeDir, m.ID)
}

// hot is what is to be filled first. A record that cannot be read orders nothing.
func (s *service) hot(ctx context.Context, p *pendingRestore) []pager.Range {
	name := s.hotFile(p)
	if name == "" {
		return nil
	}
	ranges, err := pager.ReadHot(name)
	if err != nil {
		log.G(ctx).WithError(err).Warn("memory is filled in no particular order")
	}
	return ranges
}

// recordHot keeps what tasks asked for, now that memory is full.
func (s *service) recordHot(ctx context.Context, l *lazyRestore) {
	name := s.hotFile(l.from)
	if name == "" {
		return
	}
	if err := pager.AddHot(name, l.pager.Touched()); err != nil {
		log.G(ctx).WithError(err).Warn("what a clone asked for is not recorded")
	}
}
